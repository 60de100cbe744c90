"""The passes, each a generic kernel over a table: a program for each chunk, or a few programs that walk all chunks.

Every kernel takes the address of the step table (``PassArgs``, hyper-parameter rows, gradient addresses), and those of
the tensor table and the chunk table. What a combination needs is compiled for it: rule, formats, chunk, norm type.
Integers that change from step to step are never specialised on.
"""

from .accumulate import accumulate_pass
from .measure import measure_pass
from .norm import finalize_pass, norm_pass
from .scale import scale_pass
from .update import update_pass

__all__ = ["accumulate_pass", "finalize_pass", "measure_pass", "norm_pass", "scale_pass", "update_pass"]
