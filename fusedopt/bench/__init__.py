"""What ``fusedopt bench`` and ``benchmarks/`` measure with: workloads, contracts, peers, checks, clocks, plots.

``workloads.py`` says on which tensors, ``contracts.py``, ``accumulation.py`` and ``graphs.py`` what is done to them,
``peers.py`` by whom else; ``checks.py`` judges results, ``timing.py`` takes times, ``runner.py`` puts them together,
``suites.py`` and ``session.py`` make a run of it, ``compare.py`` and ``plots.py`` read what it wrote. Needs numpy.
"""
