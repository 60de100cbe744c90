"""What all optimizers share: the step, the results of a step, checkpoints. A subclass adds a rule and its signature."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import chain
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, cast

import torch

from .. import formats, passes, sharding
from ..backends import check_name, for_device, wanted
from ..checks import check_clipping, check_complex_clipping, check_hyperparameters, check_norm_reduce, check_params
from ..compiling import keep_out_of_graphs
from ..control import Control, Controls
from ..formats import OPTIONS, check_format_options, needs_seed, param_format, state_format
from ..specs import RULES
from . import checkpoint, memory, metrics
from .memory import MemorySummary
from .metrics import StepMetrics
from .offload import check_offload
from .options import STEP_OPTIONS, Options
from .plan import OptimizerPlan
from .processes import join_norms, processes_of, tensor_norms_of
from .release import GradientRelease, check_releasable, releasable
from .repeat import repetition_of
from .wrappers import check_unwrapped, is_watched_by_accelerate

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["FusedOptimizer", "Options"]


class Accumulator(Protocol):
    """What an optimizer asks of the :class:`fusedopt.GradAccumulator` that is attached to it."""

    @property
    def holds(self) -> bool: ...
    def main_grad(self, where: str, param: torch.Tensor) -> Any: ...
    def step_scalars(self, own: bool) -> dict[str, Any]: ...
    def release(self, param: torch.Tensor) -> None: ...
    def reset(self) -> None: ...
    def bytes(self) -> int: ...


class FusedOptimizer(torch.optim.Optimizer):
    """A ``torch.optim.Optimizer`` whose step takes one kernel launch per combination of formats, or two with clipping.

    Args:
        params: tensors, named tensors, or param groups: dense leaf tensors of dtype float32, bfloat16, float16,
            float64, complex64 or complex128, any shape and layout, any mixture of devices and dtypes. A complex one
            takes the step of its ``torch.view_as_real``, without formats.
        defaults: the hyper-parameters of param groups that do not set their own.

    For the whole optimizer; attributes that may be changed between steps:
        max_grad_norm: clip the gradients' total norm to this; None for no clipping.
        norm_type: order of that norm: 1, 2 or inf; with complex gradients 2.
        max_grad_value: clamp each unscaled gradient element to ± this, before the norm is taken; None for no clamping.
            Not for complex gradients.
        nonfinite: what an inf or NaN gradient element does: "propagate" into the parameters, as torch.optim does, or
            "skip" the whole step, decided on the device.

    Where gradients are spread over processes:
        norm_reduce: combines the norm with processes that hold other parameters, as pipeline stages do:
            ``norm_reduce(sums, op)`` reduces a small tensor in place like ``torch.distributed.all_reduce`` with that
            ``op``; ``functools.partial(torch.distributed.all_reduce, group=…)`` is one. It is called in every step that
            takes a norm. Not needed for DTensors (FSDP2, tensor parallelism), whose meshes are known. An attribute;
            checkpoints do not have it.

    Formats; a param group may set its own:
        master_weights: for bfloat16 parameters (the first for float16 too): "fp32" keeps a float32 copy
            (``state["master_param"]``); "split16" keeps the low half of a float32 whose high half is the parameter
            (int16 ``state["param_remainder"]``), exact in 4 bytes; "split8" keeps 8 more bits (int8), 24 in all.
        state_dtype: "fp32", "bf16" or "int8" (1 byte and 1/64 of one for scales, ``state["exp_avg_scale"]``); None
            takes fp32 with master weights and else the parameter's dtype, as torch.optim does.
        stochastic_rounding: of bfloat16 parameters without master weights, and of bfloat16 states beside them.
        min_8bit_size: tensors of fewer elements keep fp32 states where ``state_dtype`` is "int8".
        seed: of the random bits for stochastic rounding and int8, one for the whole optimizer: they depend on it, the
            step, the tensor and the element alone. Drawn from torch's default generator if None; saved in
            checkpoints. Processes that hold the same parameters need the same one.

    Where it runs:
        backend: "cpu", "cuda", "triton" or "reference"; None takes what ``fusedopt.use_backend`` or FUSEDOPT_BACKEND
            asks for, or else the best for each device. Never saved: a checkpoint runs on any backend.
        offload: "cpu" keeps the states and masters of parameters on other devices in host memory and updates them
            there, while gradients arrive and parameters return; ``step()`` returns when the host has done its part.
            Of a DTensor that is this process' part. Not for graph captures and ``release_gradients``. Never saved.

    Gradients are only read, from ``.grad``, or from an attribute ``main_grad`` (Megatron's) that is there before the
    first step and not None. They may be of any of the dtypes, float64 only with float64, complex ones only with their
    own.

    Raises:
        ValueError, TypeError: bad hyper-parameters, options or parameters.
        RuntimeError: a CUDA parameter where kernels cannot be compiled; a backend that is not available; sparse
            gradients.
    """

    rule: ClassVar[str]
    """Family of the rules in ``fusedopt.specs.RULES``. An optimizer with variants overrides ``_rule_name``."""
    rule_keys: ClassVar[tuple[str, ...]] = ()
    """Keys of a param group that choose between the rules of the family; they may change between steps."""

    _agreed = False
    """Whether the processes of each mesh were found to have the same parameters and options."""
    _fetches: tuple[torch.device, metrics.Fetches] | None = None

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any], **options: Unpack[Options]) -> None:
        where = type(self).__name__
        unknown = sorted(options.keys() - Options.__annotations__.keys())
        if unknown:
            raise TypeError(
                f"{where}: got an unexpected keyword argument {unknown[0]!r}, expected a hyper-parameter of the rule "
                f"or one of {', '.join(Options.__annotations__)}; remove it"
            )
        check_hyperparameters(where, defaults)
        self._steps = 0  # calls of step(); of the instance, for wrappers look there for what their class does not have
        self._accumulator: Accumulator | None = None
        self._release: GradientRelease | None = None
        self._forget_plan()
        self._backend = check_name(f"{where}: backend", options.get("backend"))
        self._norm_reduce: sharding.NormReduce | None = check_norm_reduce(where, options.get("norm_reduce"))
        self._offload = check_offload(where, options.get("offload"))
        self._controls = Controls()
        self._options: Options = {}
        self._set_options(**{key: options.get(key, default) for key, default in STEP_OPTIONS.items()})
        # Only what differs from the default is put into param groups: without formats they are exactly torch's.
        given: dict[str, Any] = {**options}
        chosen = {key: given[key] for key in OPTIONS if given.get(key, OPTIONS[key]) != OPTIONS[key]}
        if options.get("seed") is not None:
            chosen["seed"] = options["seed"]
        if isinstance(params, torch.Tensor):
            raise TypeError(f"{where}: params is a Tensor, expected an iterable of them; pass [param]")
        params = list(params)
        if not params:
            raise ValueError(f"{where}: params is empty, expected at least one parameter; pass model.parameters()")
        super().__init__(params, {**defaults, **chosen})
        self._keep_out_of_graphs()

    # ---- options --------------------------------------------------------------------------------------

    def _set_options(self, **changes: Any) -> None:
        check_unwrapped(type(self).__name__, self)
        before, options = self._options, cast(Any, {**self._options, **changes})
        check_clipping(type(self).__name__, **options)
        self._options = options
        if self._releases():
            try:
                check_releasable(self)
            except ValueError:
                self._options = before
                raise
        self._scalars = passes.StepScalars(
            max_grad_value=options["max_grad_value"],
            max_grad_norm=options["max_grad_norm"],
            norm_type=float(options["norm_type"]),
            skip_nonfinite=options["nonfinite"] == "skip",
        )

    @property
    def max_grad_norm(self) -> float | None:
        """Bound of the gradients' total norm, or None."""
        return self._options["max_grad_norm"]

    @max_grad_norm.setter
    def max_grad_norm(self, value: float | None) -> None:
        self._set_options(max_grad_norm=value)

    @property
    def norm_type(self) -> float:
        """Order of the norm: 1, 2 or inf."""
        return self._options["norm_type"]

    @norm_type.setter
    def norm_type(self, value: float) -> None:
        self._set_options(norm_type=value)

    @property
    def max_grad_value(self) -> float | None:
        """Bound of each unscaled gradient element, or None."""
        return self._options["max_grad_value"]

    @max_grad_value.setter
    def max_grad_value(self, value: float | None) -> None:
        self._set_options(max_grad_value=value)

    @property
    def nonfinite(self) -> str:
        """What an inf or NaN gradient element does: "propagate" or "skip"."""
        return self._options["nonfinite"]

    @nonfinite.setter
    def nonfinite(self, value: str) -> None:
        self._set_options(nonfinite=value)

    @property
    def backend(self) -> str | None:
        """The backend that this optimizer was told to run on, or None."""
        return self._backend

    @backend.setter
    def backend(self, value: str | None) -> None:
        check_unwrapped(type(self).__name__, self)
        self._backend = check_name(f"{type(self).__name__}: backend", value)

    @property
    def offload(self) -> str | None:
        """Where states are and the update is made: "cpu", or None for the parameters' devices."""
        return None if self._offload is None else "cpu"

    @property
    def norm_reduce(self) -> Callable[[torch.Tensor, Any], Any] | None:
        """What combines the norm with other processes', or None."""
        return self._norm_reduce

    @norm_reduce.setter
    def norm_reduce(self, value: Callable[[torch.Tensor, Any], Any] | None) -> None:
        check_unwrapped(type(self).__name__, self)
        self._norm_reduce = check_norm_reduce(type(self).__name__, value)
        self._scalars = self._scalars._replace()  # another object: the next step is not like the last one

    @property
    def _takes_norm(self) -> bool:
        return self.max_grad_norm is not None or self.nonfinite == "skip"

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether GradScaler hands over its scale and verdict and always calls step.

        Only where somebody asked for a fused step: Accelerate and Lightning treat such optimizers differently.
        """
        # With main gradients it must not divide .grad alone: it is told to hand over, and then refused.
        if self._has_accumulated() or is_watched_by_accelerate(self):
            return self._has_accumulated()
        return self._takes_norm or self.max_grad_value is not None or any(g.get("fused") for g in self.param_groups)

    # ---- param groups ---------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch.optim; ValueError or TypeError, and no group added, for bad parameters or hyper-parameters."""
        where = type(self).__name__
        if isinstance(param_group, dict) and "params" in param_group:
            params = param_group["params"]
            if not isinstance(params, torch.Tensor | set):
                param_group = {**param_group, "params": list(params)}
            plain = [params] if isinstance(params, torch.Tensor) else param_group["params"]
            each = [p[1] if isinstance(p, tuple) and len(p) == 2 else p for p in plain]
            check_params(f"{where}: params", each, sharded=True)
            check_hyperparameters(where, {**self.defaults, **param_group})
            param_group = self._check_formats({**self.defaults, **param_group}, plain, param_group)
            for device in {p.device for p in plain if isinstance(p, torch.Tensor)}:
                for_device(device, self._backend)
        super().add_param_group(param_group)
        self._forget_plan()

    def _check_formats(self, group: dict[str, Any], params: Iterable[Any], given: dict[str, Any]) -> dict[str, Any]:
        """``given``, with a seed where ``group``, the same with the defaults, needs one."""
        where = type(self).__name__
        check_format_options(where, group, RULES[self._rule_name(group)])
        for i, param in enumerate(p[1] if isinstance(p, tuple) and len(p) == 2 else p for p in params):
            param_format(f"{where}: params[{i}]", group, param.dtype)
            state_format(f"{where}: params[{i}]", group, param)
        if not needs_seed(group):
            return given
        seeds = [other["seed"] for other in self.param_groups if "seed" in other]
        if "seed" in group and seeds and group["seed"] != seeds[0]:
            raise ValueError(
                f"{where}: got seed={group['seed']} in one param group and {seeds[0]} in another, expected one for "
                "all; pass it to the optimizer"
            )
        return {**given, "seed": group["seed"] if "seed" in group else (seeds or [int(torch.randint(2**62, ()))])[0]}

    def _forget_plan(self) -> None:
        self._plan: OptimizerPlan | None = None
        self._norm_taken = False
        if self._release is not None and self._releases():
            self._release.forget_plans()

    def _rule_name(self, group: dict[str, Any]) -> str:
        """The rule of a param group. Which one it is depends on the truth of ``rule_keys`` alone."""
        return self.rule

    def _rule_names(self) -> list[str]:
        return [self._rule_name(group) for group in self.param_groups]

    @property
    def _initial_state(self) -> float:
        """What new states are filled with."""
        return 0.0

    # ---- the step -------------------------------------------------------------------------------------

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Performs one optimization step.

        Args:
            closure: reevaluates the model and returns the loss, with gradients enabled.

        Returns:
            What the closure returned, else None.

        Raises:
            RuntimeError: sparse gradients; a first step while a CUDA graph is being captured; torch's GradScaler beside
                accumulated gradients.
            ValueError, TypeError: a gradient whose shape, device or dtype does not fit its parameter. Nothing has
            been changed then.
        """
        plan = self._plan
        repetition = None if closure is not None or plan is None else plan.repetition
        if repetition is not None and repetition.run(self.__dict__):
            self._steps += 1
            return None
        return self._hooked_step() if closure is None else self._hooked_step(closure)

    # torch.optim.Optimizer wraps a step that is not, for hooks that are rarely there: 0.1 ms with cold caches.
    step.hooked = True  # type: ignore[attr-defined]

    def _plain_step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._refuse_torch_scaler()
        plan = self._plan
        if plan is None or plan.backend != wanted(self._backend) or not plan.refresh(self):
            plan = self._replan()
        if plan.tables:
            self._run(plan)
        else:
            join_norms(self, plan)
        if self._accumulator is not None:
            self._accumulator.reset()
        self._steps += 1
        return loss

    _hooked_step = torch.optim.Optimizer.profile_hook_step(_plain_step)

    def _keep_out_of_graphs(self) -> None:
        overridden = type(self).step is not FusedOptimizer.step
        always = ("_hooked_step", "zero_grad", "metrics", *(("step",) if overridden else ()))
        keep_out_of_graphs(type(self), *always, alone=() if overridden else ("step",))

    def _replan(self) -> OptimizerPlan:
        self._plan = None
        with torch.no_grad():
            self._control()  # goes where the parameters are before the step adds to it
            self._plan = OptimizerPlan.make(self, self._rule_names(), self._controls, wanted(self._backend))
        return self._plan

    def _step_scalars(self, plan: OptimizerPlan) -> passes.StepScalars:
        scalars = self._scalars
        given = self.__dict__  # GradScaler sets these for the time of a step, torch's the first two, ours the last
        if "found_inf" in given or "grad_scale" in given or "_nonfinite_found" in given:
            if self._releases():
                raise RuntimeError(
                    f"{type(self).__name__}.step: got a gradient scaler beside release_gradients(), expected an "
                    "unscaled loss: parameters have been updated before the scale was known; use bfloat16 or remove() "
                    "the release"
                )
            scalars = scalars._replace(grad_scale=given.get("grad_scale"), found_inf=given.get("found_inf"))
        if "_nonfinite_found" in given:
            scalars = scalars._replace(skip_nonfinite=True)
            if plan.watch.has_grads() or self._has_accumulated():
                given["_nonfinite_found"].update({each.device: each.control.norm_found_inf for each in plan.tables})
        if self._accumulator is not None:
            scalars = scalars._replace(**self._accumulator.step_scalars(plan.watch.has_grads()))
        return scalars

    def _run(self, plan: OptimizerPlan) -> None:
        with plan.fresh_state_only_if_used(self):
            scalars = self._step_scalars(plan)
            takes_norm = scalars.max_grad_norm is not None or scalars.skip_nonfinite
            names = ("norm", "update") if takes_norm else ("update",)
            reports = "_nonfinite_found" in self.__dict__
            if self._accumulator is not None or not (
                plan.repetition and plan.repetition.serves(self._scalars, reports)
            ):
                plan.repetition = None  # before anything can fail: the passes are told other things now
            self._run_passes(plan, scalars, names, self.param_groups)
        if plan.repetition is None:
            plan.repetition = repetition_of(self, plan, names, reports)

    def _run_passes(
        self, plan: OptimizerPlan, scalars: passes.StepScalars, names: tuple[str, ...], groups: list[dict[str, Any]]
    ) -> None:
        if plan.has_complex:
            self._check_complex()
        plan.begin(f"{type(self).__name__}.step", scalars, names, groups)
        tensor_norms_of(self, plan)  # where the processes disagree it says so
        plan.gather_copies()
        if "norm" in names:
            passes.norm(plan.tables, scalars.norm_type, processes_of(self, plan))
        plan.fresh = []
        plan.update()
        plan.scatter_copies()
        # The kernels write behind autograd's back; without this a later backward would use overwritten weights.
        plan.bump_versions()
        self._norm_taken = "norm" in names

    def _check_complex(self) -> None:
        """TypeError or ValueError where this step is to clip as complex gradients cannot be clipped."""
        takes_norm = self._takes_norm or "_nonfinite_found" in self.__dict__
        norm_type = self.norm_type if takes_norm else None
        check_complex_clipping(f"{type(self).__name__}.step", self.max_grad_value, norm_type)

    def _run_alone(self, plan: OptimizerPlan, param: torch.Tensor) -> None:
        """The update of one parameter, inside a backward pass."""
        scalars = self._scalars
        with plan.fresh_state_only_if_used(self):
            if self._accumulator is not None:
                scalars = scalars._replace(**self._accumulator.step_scalars(plan.watch.has_grads()))
            self._run_passes(plan, scalars, ("update",), plan.alone.hyper(self.param_groups) if plan.alone else [])
        if self._accumulator is not None:
            self._accumulator.release(param)

    def release_gradients(self, module: torch.nn.Module | Iterable[torch.Tensor] | None = None) -> GradientRelease:
        """From now on, updates each parameter in the backward pass as soon as its gradient is complete, and frees it.

        At no time do all gradients exist. Go on calling ``step()``, which updates what has not been released, and
        ``zero_grad()``, as usual. With several micro-batches, run the backward passes of all but the last inside
        ``with handle.paused():``. The loss must not be scaled, and each parameter must get its gradient once per
        backward pass (not so in reentrant activation checkpointing of shared layers).

        Args:
            module: whose parameters to release, as far as they belong to this optimizer, or the parameters themselves;
                by default all of this optimizer's that require a gradient.

        Returns:
            A handle: ``remove()`` undoes it, ``paused()`` is a context manager.

        Raises:
            ValueError: ``max_grad_norm`` or ``nonfinite="skip"``, which need all gradients; LAMB of DTensors, which
                needs other processes; no parameter in common.
            RuntimeError: gradients are being released already.
        """
        self._release = GradientRelease(self, releasable(self, module))
        return self._release

    def _releases(self) -> bool:
        release = self.__dict__.get("_release")
        return release is not None and release.active

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch.optim; drops what a :class:`fusedopt.GradAccumulator` holds too."""
        super().zero_grad(set_to_none)
        if self._accumulator is not None:
            self._accumulator.reset()

    # ---- accumulation -----------------------------------------------------------------------------------

    def _attach_accumulator(self, accumulator: Accumulator | None) -> None:
        if accumulator is not None and self._accumulator is not None:
            raise ValueError(
                f"GradAccumulator: got an {type(self).__name__} that has an accumulator already, expected one without; "
                "use that one, or detach() it first"
            )
        self._accumulator = accumulator
        self._forget_plan()

    def _has_accumulated(self) -> bool:
        """Whether main gradients wait for a step."""
        return self._accumulator is not None and self._accumulator.holds

    def _refuse_torch_scaler(self) -> None:
        """RuntimeError where torch's GradScaler, which sees no main gradient, has looked for inf and NaN."""
        given = self.__dict__
        if given.get("found_inf") is None or "_nonfinite_found" in given or not self._has_accumulated():
            return
        given.pop("found_inf"), given.pop("grad_scale", None)  # the scaler would leave them behind
        raise RuntimeError(
            f"{type(self).__name__}.step: got found_inf, as torch.amp.GradScaler sets it after a look at .grad, beside "
            "main gradients of a GradAccumulator, which it knows nothing of; expected fusedopt.GradScaler, without "
            "unscale_(): use it in its place"
        )

    def _accumulated_grad(self, where: str, param: torch.Tensor) -> Any:
        return None if self._accumulator is None else self._accumulator.main_grad(where, param)

    # ---- results of the last step -----------------------------------------------------------------------

    def _control(self) -> Control:
        """Of the first parameter's device; there may be none, as in a process of ZeRO-1 whose part is empty."""
        return self._controls.reported_on(sharding.home_of(self.param_groups))

    @property
    def grad_norm(self) -> torch.Tensor:
        """Total norm of the unscaled gradients before clipping, 0-dim float32; NaN if the step took none."""
        control = self._control()
        return control.total_norm.clone() if self._norm_taken else torch.full_like(control.total_norm, float("nan"))

    @property
    def clip_coef(self) -> torch.Tensor:
        """What the gradients were multiplied by to clip their norm, 0-dim float32; 1 if the step took no norm."""
        control = self._control()
        return control.clip_coef.clone() if self._norm_taken else torch.ones_like(control.clip_coef)

    @property
    def step_was_skipped(self) -> torch.Tensor:
        """Whether the last step changed nothing because of inf or NaN, 0-dim bool."""
        return self._control().skipped != 0

    @property
    def skipped_steps(self) -> torch.Tensor:
        """How many steps were skipped since this optimizer was made, 0-dim int64."""
        return self._control().skipped_steps.clone()

    def metrics(self) -> StepMetrics | None:
        """The newest results that have reached the host; asks for those of the last step. Never waits.

        On a GPU each call enqueues one copy of 64 bytes to pinned memory, and returns what earlier calls have brought:
        None at first, then results of a step or a few ago (``StepMetrics.step`` says which). If eight copies are under
        way, and while a CUDA graph is being captured, nothing is asked for. On the CPU: those of the last step. Results
        are of the first parameter's device, which the norm of all devices reaches too.
        """
        return metrics.fetch(self)

    @property
    def last_step(self) -> StepMetrics | None:
        """The results of the last step; None before the first. Waits for the device."""
        return metrics.wait(self)

    # ---- formats ------------------------------------------------------------------------------------------

    def memory_summary(self) -> MemorySummary:
        """How many bytes everything takes that belongs to the parameters of this optimizer, by role."""
        accumulated = 0 if self._accumulator is None else self._accumulator.bytes()
        return memory.summarize(self, [RULES[name] for name in self._rule_names()], self._plan, accumulated)

    @torch.no_grad()
    def master_params(self) -> list[torch.Tensor]:
        """The parameters to all the digits that are kept of them, in the order of the param groups.

        New tensors, float32 (parameters of float64 and complex ones keep their dtype): what to save where bfloat16
        weights are not enough.
        """
        params = chain.from_iterable(group["params"] for group in self.param_groups)
        return [sharding.on_locals(formats.decode_master, self.state.get(param, {}), param, param) for param in params]

    @torch.no_grad()
    def torch_state_dict(self) -> dict[str, Any]:
        """A state dict that the torch.optim class of the same name loads: states in float32, no masters, no formats."""
        return checkpoint.export(self, super().state_dict())

    # ---- checkpoints, copies ------------------------------------------------------------------------------

    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        """As torch.optim; of DTensors 8-bit states and split masters are dicts of DTensors, which may be cut anywhere.

        Then a state in 8 bits takes a byte more for each element than it does between steps.
        """
        return checkpoint.save(self, super().state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a checkpoint of this class or of the torch.optim class of the same name.

        Unlike torch's, it copies instead of sharing memory and does not cast state to the parameter's dtype. State of
        another format than this optimizer's is converted, rounded to nearest; the formats stay this optimizer's. Where
        ``state_dtype`` is None, floating-point states keep the dtype they were saved in.

        Raises:
            ValueError: other param groups, other shapes or dtypes, missing keys. Nothing has been changed then.
        """
        checkpoint.load(self, state_dict)

    def __getstate__(self) -> dict[str, Any]:
        own = ("_options", "_backend", "_norm_reduce", "_offload")
        return {**super().__getstate__(), **{key: self.__dict__[key] for key in own}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._keep_out_of_graphs()
        self._set_options(**self.__dict__.setdefault("_options", STEP_OPTIONS))
        self.__dict__.setdefault("_controls", Controls())
        self.__dict__.setdefault("_steps", 0)
        for key in ("_accumulator", "_release", "_backend", "_norm_reduce", "_offload"):
            self.__dict__.setdefault(key, None)
        self._forget_plan()
        for group in self.param_groups:
            for key, value in self.defaults.items():
                group.setdefault(key, value)
