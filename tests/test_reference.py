"""The reference against numbers worked out by hand and torch in float64, and the bounds against wrong optimizers."""

import math

import pytest
import torch
from bounds import assert_within, bounded_step, hyper_of
from cases import FUNCTION_HYPER, WITH_PEER, hard_values, normal, parameter, set_gradients

from fusedopt import reference, specs

HYPER = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-4, "weight_decay": 0.1}
LION_HYPER = {key: HYPER[key] for key in ("lr", "betas", "weight_decay")}


def scalar(x):
    return torch.tensor(x, dtype=torch.float64)


def test_first_steps_by_hand():
    p, g, m, v = scalar(2.0), scalar(0.5), scalar(0.25), scalar(0.01)
    # AdamW, step 2: m = .9*.25 + .1*.5 = .275, m_hat = .275 / .19; v = .99*.01 + .01*.25 = .0124, v_hat = .0124 / .0199
    new, states = reference.reference_step("adamw", p, g, {"exp_avg": m, "exp_avg_sq": v}, step=2, **HYPER)
    update = (0.275 / 0.19) / (math.sqrt(0.0124 / 0.0199) + 1e-4)
    assert new.item() == pytest.approx(2.0 * 0.999 - 1e-2 * update, rel=1e-14)
    assert (states["exp_avg"].item(), states["exp_avg_sq"].item()) == pytest.approx((0.275, 0.0124), rel=1e-13)
    # Adam: the gradient is .5 + .1*2 = .7, so m = .225 + .07 = .295, v = .0099 + .0049 = .0148
    new, states = reference.reference_step("adam", p, g, {"exp_avg": m, "exp_avg_sq": v}, step=2, **HYPER)
    assert new.item() == pytest.approx(2 - 1e-2 * (0.295 / 0.19) / (math.sqrt(0.0148 / 0.0199) + 1e-4), rel=1e-14)
    # Lion: c = .9*(-.1) + .1*.5 < 0, m = .99*(-.1) + .01*.5
    new, states = reference.reference_step("lion", p, g, {"exp_avg": scalar(-0.1)}, step=5, **LION_HYPER)
    assert new.item() == pytest.approx(2.0 * 0.999 + 1e-2, rel=1e-14)
    assert states["exp_avg"].item() == pytest.approx(-0.094, rel=1e-13)


LAMB = {**HYPER, "bias_correction": True, "adam_w_mode": True, "grad_averaging": True, "use_nvlamb": False}
P, G = 2.0, 0.5
L2 = 0.7  # G + 0.1 * P
RMS = {"lr": 0.01, "alpha": 0.9, "eps": 0.1, "weight_decay": 0.1, "momentum": 0.5}
SGD = {"lr": 0.01, "momentum": 0.8, "dampening": 0.4, "weight_decay": 0.1, "nesterov": False}
ROOT = math.sqrt(0.9 * 0.04 + 0.1 * 0.49)  # of square_avg
SPREAD = math.sqrt(0.085 - (0.9 * 0.2 + 0.1 * 0.7) ** 2)
# rule, step, states before, hyper-parameters, expected parameter, expected states
BY_HAND = [
    ("sgd", 1, {}, {"lr": 0.01, "weight_decay": 0.1}, P - 0.01 * L2, {}),
    ("sgdw", 1, {}, {"lr": 0.01, "weight_decay": 0.1}, P * 0.999 - 0.01 * G, {}),
    ("sgd_momentum", 1, {"momentum_buffer": 9.0}, SGD, P - 0.01 * L2, {"momentum_buffer": L2}),
    ("sgd_momentum", 2, {"momentum_buffer": 1.0}, SGD, P - 0.01 * 1.22, {"momentum_buffer": 0.8 + 0.6 * 0.7}),
    (
        "sgd_momentum",
        2,
        {"momentum_buffer": 1.0},
        {**SGD, "dampening": 0.0, "nesterov": True},
        P - 0.01 * (0.7 + 0.8 * 1.5),
        {"momentum_buffer": 1.5},
    ),
    ("sgdw_momentum", 2, {"momentum_buffer": 1.0}, SGD, P * 0.999 - 0.01 * 1.1, {"momentum_buffer": 1.1}),
    ("rmsprop", 5, {"square_avg": 0.04}, RMS, P - 0.01 * 0.7 / (ROOT + 0.1), {"square_avg": 0.085}),
    (
        "rmsprop_momentum",
        5,
        {"square_avg": 0.04, "momentum_buffer": 3.0},
        RMS,
        P - 0.01 * (1.5 + 0.7 / (ROOT + 0.1)),
        {"square_avg": 0.085, "momentum_buffer": 1.5 + 0.7 / (ROOT + 0.1)},
    ),
    (
        "rmsprop_centered",
        5,
        {"square_avg": 0.04, "grad_avg": 0.2},
        RMS,
        P - 0.01 * 0.7 / (SPREAD + 0.1),
        {"square_avg": 0.085, "grad_avg": 0.25},
    ),
    (
        "rmsprop_centered_momentum",
        5,
        {"square_avg": 0.04, "momentum_buffer": 3.0, "grad_avg": 0.2},
        RMS,
        P - 0.01 * (1.5 + 0.7 / (SPREAD + 0.1)),
        {"square_avg": 0.085, "momentum_buffer": 1.5 + 0.7 / (SPREAD + 0.1), "grad_avg": 0.25},
    ),
    (
        "adagrad",
        3,
        {"sum": 0.15},
        {"lr": 0.01, "lr_decay": 0.25, "weight_decay": 0.1, "eps": 0.2},
        P - 0.01 / 1.5 * 0.7 / (0.8 + 0.2),
        {"sum": 0.64},
    ),
    # m = .9*.25 + .1*.7, v = .99*.01 + .01*.49 < .04, corrections 1 - .81 and 1 - .9801
    (
        "adam_amsgrad",
        2,
        {"exp_avg": 0.25, "exp_avg_sq": 0.01, "max_exp_avg_sq": 0.04},
        HYPER,
        P - 1e-2 * (0.295 / 0.19) / (math.sqrt(0.04 / 0.0199) + 1e-4),
        {"exp_avg": 0.295, "exp_avg_sq": 0.0148, "max_exp_avg_sq": 0.04},
    ),
    (
        "adamw_amsgrad",
        2,
        {"exp_avg": 0.25, "exp_avg_sq": 0.01, "max_exp_avg_sq": 0.001},
        HYPER,
        P * 0.999 - 1e-2 * (0.275 / 0.19) / (math.sqrt(0.0124 / 0.0199) + 1e-4),
        {"exp_avg": 0.275, "exp_avg_sq": 0.0124, "max_exp_avg_sq": 0.0124},
    ),
    # rho_2 = 199 - 4 * .9801 / .0199 < 5: momentum alone
    (
        "radam",
        2,
        {"exp_avg": 0.25, "exp_avg_sq": 0.01},
        {**HYPER, "decoupled_weight_decay": True},
        P * 0.999 - 1e-2 * 0.275 / 0.19,
        {"exp_avg": 0.275, "exp_avg_sq": 0.0124},
    ),
    # of one number the update is the parameter's magnitude with the update's sign, whatever the moments
    (
        "lamb",
        2,
        {"exp_avg": 0.25, "exp_avg_sq": 0.01},
        LAMB,
        P - 1e-2 * P,
        {"exp_avg": 0.275, "exp_avg_sq": 0.0124},
    ),
    (
        "lamb",
        2,
        {"exp_avg": 0.25, "exp_avg_sq": 0.01},
        {**LAMB, "weight_decay": 0.0, "bias_correction": False, "grad_averaging": False},
        P - 1e-2 * 0.725 / (math.sqrt(0.0124) + 1e-4),
        {"exp_avg": 0.725, "exp_avg_sq": 0.0124},
    ),
    (
        "lamb",
        2,
        {"exp_avg": 0.25, "exp_avg_sq": 0.01},
        {**LAMB, "adam_w_mode": False},
        P - 1e-2 * P,
        {"exp_avg": 0.295, "exp_avg_sq": 0.0148},
    ),
]


@pytest.mark.parametrize("rule, step, before, hyper, param, after", BY_HAND, ids=lambda value: str(value)[:30])
def test_other_rules_by_hand(rule, step, before, hyper, param, after):
    before = {name: scalar(value) for name, value in before.items()}
    new, states = reference.reference_step(rule, scalar(P), scalar(G), before, step=step, **hyper)
    assert new.item() == pytest.approx(param, rel=1e-14)
    assert {name: value.item() for name, value in states.items()} == pytest.approx(after, rel=1e-13)


def test_every_rule_was_worked_out_by_hand():
    assert {row[0] for row in BY_HAND} | {"adam", "adamw", "lion"} == reference.RULES.keys()


def test_radam_rectified():
    """Liu et al.'s r_t at beta2 = 0.9, t = 10: rho_inf = 19, rho_t = 19 - 20 * .9^10 / (1 - .9^10)."""
    power = 0.9**10
    rho = 19 - 20 * power / (1 - power)
    r = math.sqrt((rho - 4) * (rho - 2) * 19 / (15 * 17 * rho))
    hyper = {"lr": 0.1, "betas": (0.0, 0.9), "eps": 0.3, "weight_decay": 0.0, "decoupled_weight_decay": False}
    states = {"exp_avg": scalar(7.0), "exp_avg_sq": scalar(0.04)}
    new, _ = reference.reference_step("radam", scalar(P), scalar(G), states, step=10, **hyper)
    v = 0.9 * 0.04 + 0.1 * 0.25
    assert new.item() == pytest.approx(P - 0.1 * 0.5 * r * math.sqrt(1 - power) / (math.sqrt(v) + 0.3), rel=1e-13)


def test_centered_variance_is_not_negative():
    """Where rounded states say so, it is 0."""
    states = {"square_avg": scalar(0.25), "grad_avg": scalar(0.5000001)}
    hyper = {"lr": 1.0, "alpha": 0.5, "eps": 0.25, "weight_decay": 0.0, "momentum": 0.0}
    new, _ = reference.reference_step("rmsprop_centered", scalar(P), scalar(G), states, step=1, **hyper)
    assert new.item() == P - 0.5 / 0.25


def test_lion_sign():
    grad = torch.tensor([0.0, -0.0, 3.0, -math.inf, math.nan])
    hyper = {"lr": 1.0, "betas": (0.9, 0.99), "weight_decay": 0.0}
    new, _ = reference.reference_step("lion", torch.zeros(5), grad, {"exp_avg": torch.zeros(5)}, step=1, **hyper)
    assert new[:4].tolist() == [0, 0, -1, 1] and new[4].isnan()


def test_gradient_transform_order():
    grad = torch.tensor([8.0, -80.0])
    got = reference.transform_gradient(grad, grad_scale=4.0, max_grad_value=5.0, clip_coef=0.5)
    assert got.tolist() == [1.0, -2.5]


def test_total_norm_and_clip_coefficient():
    tensors = [torch.tensor([3.0]), torch.zeros(0), torch.tensor([[-4.0]], dtype=torch.float64)]
    assert [reference.total_norm(tensors, t).item() for t in (1.0, 2.0, math.inf)] == [7.0, 5.0, 4.0]
    assert reference.total_norm([torch.full((3,), 1e30)]).item() == pytest.approx(math.sqrt(3) * 1e30, rel=1e-6)
    assert reference.total_norm([]).item() == 0
    assert reference.clip_coefficient(scalar(5.0), 2.5).item() == pytest.approx(0.5, rel=1e-6)
    assert reference.clip_coefficient(scalar(5.0), 6.0).item() == 1
    assert reference.clip_coefficient(scalar(math.nan), 1.0).isnan()


def test_ulp_and_rounding():
    values = torch.tensor([0.0, 1.0, -1.5, 2.0, 3e-42], dtype=torch.float64)
    assert reference.ulp(values, torch.float32).tolist() == [2.0**-149, 2.0**-23, 2.0**-23, 2.0**-22, 2.0**-149]
    assert reference.ulp(scalar(1.0), torch.bfloat16) == 2.0**-7
    # Rounded to float32 first, this becomes the tie 1 + 2^-8 and then 1.
    just_above_tie = scalar(1 + 2.0**-8 + 2.0**-40)
    assert reference.round_to(just_above_tie, torch.bfloat16).item() == 1 + 2.0**-7
    assert reference.round_to(scalar(65519.99), torch.float16).item() == 65504
    assert reference.round_to(scalar(65520.0), torch.float16).item() == math.inf


@pytest.mark.parametrize("case", WITH_PEER, ids=str)
def test_equals_torch_in_float64(case):
    p = parameter(normal((1000,), torch.float64))
    opt = case.make_peer([p], foreach=False)
    start = torch.full_like(p.data, case.kwargs.get("initial_accumulator_value", 0.0))
    expected, states = p.detach().clone(), dict.fromkeys(reference.STATES[case.rule], start)
    for step in range(1, 11):
        set_gradients([p], seed=step)
        hyper = hyper_of(opt.param_groups[0], case.rule) | {"maximize": opt.param_groups[0]["maximize"]}
        expected, states = reference.reference_step(case.rule, expected, p.grad, states, step=step, **hyper)
        opt.step()
    torch.testing.assert_close(p.data, expected, rtol=1e-13, atol=1e-14)
    for name in states:
        torch.testing.assert_close(opt.state[p][name], states[name], rtol=1e-13, atol=1e-14)


# ---- the bounds: right float32 arithmetic passes, every wrong optimizer is noticed ---------------------------------


def adamw_float32(p, g, m, v, *, step, lr, betas, eps, weight_decay, **wrong):
    """AdamW in float32 in torch's order of operations; `wrong` switches one mistake on."""
    beta1, beta2 = betas
    if wrong.get("coupled"):
        g = g + weight_decay * p
    elif not wrong.get("decay_last"):
        p = p - lr * weight_decay * p
    m = m + (1 - beta1) * (g - m)
    one_minus_beta2 = (1 - torch.tensor(beta2)).item() if wrong.get("float_beta") else 1 - beta2
    v = beta2 * v + one_minus_beta2 * g * g
    if wrong.get("moment_stored_first"):
        m = m.bfloat16().float()
    step = step + wrong.get("late", 0)
    bias1, bias2 = 1 - beta1**step, 1 - beta2**step
    if wrong.get("no_bias_correction"):
        bias1 = bias2 = 1
    if wrong.get("eps_inside_root"):
        denominator = (v / bias2 + eps).sqrt()
    elif wrong.get("eps_before_correction"):
        denominator = (v.sqrt() + eps) / math.sqrt(bias2)
    else:
        denominator = v.sqrt() / math.sqrt(bias2) + eps
    p = p - lr / bias1 * (m / denominator)
    if wrong.get("decay_last"):
        p = p - lr * weight_decay * p
    if wrong.get("skips_last"):
        p[-1] = p[-2]
    return p, {"exp_avg": m, "exp_avg_sq": v}


def lion_float32(p, g, m, *, step, lr, betas, weight_decay, **wrong):
    beta1, beta2 = reversed(betas) if wrong.get("betas_swapped") else betas
    p = p * (1 - lr * weight_decay)
    new = beta2 * m + (1 - beta2) * g
    c = new if wrong.get("moment_first") else beta1 * m + (1 - beta1) * g
    sign = torch.where(c > 0, 1.0, -1.0) if wrong.get("zero_is_negative") else c.sign()
    return p - lr * sign, {"exp_avg": new}


def sgd_momentum_float32(p, g, b, *, step, lr, momentum, dampening, weight_decay, nesterov, **wrong):
    if not wrong.get("decoupled"):
        g = g + weight_decay * p
    old = b
    b = momentum * b + (1 if wrong.get("undampened") else 1 - dampening) * g
    if wrong.get("lr_inside"):
        b = momentum * old + lr * (1 - dampening) * g
        return p - b, {"momentum_buffer": b}
    return p - lr * (g + momentum * b if wrong.get("looks_ahead") else b), {"momentum_buffer": b}


def rmsprop_centered_float32(p, g, v, m, *, step, lr, alpha, eps, weight_decay, momentum, **wrong):
    g = g + weight_decay * p
    old = m
    v, m = alpha * v + (1 - alpha) * (g * g), m + (1 - alpha) * (g - m)
    variance = (v - (old if wrong.get("old_mean") else 0 * old if wrong.get("uncentered") else m).square()).clamp(min=0)
    root = (variance + eps).sqrt() if wrong.get("eps_inside_root") else variance.sqrt() + eps
    return p - lr * g / root, {"square_avg": v, "grad_avg": m}


def adagrad_float32(p, g, s, *, step, lr, lr_decay, weight_decay, eps, **wrong):
    g = g + weight_decay * p
    new = s + g * g
    root = (s if wrong.get("old_sum") else new).sqrt() + eps
    return p - lr / (1 + (step - (0 if wrong.get("late") else 1)) * lr_decay) * g / root, {"sum": new}


IMPLEMENTATIONS = {
    "adamw": adamw_float32,
    "lion": lion_float32,
    "sgd_momentum": sgd_momentum_float32,
    "rmsprop_centered": rmsprop_centered_float32,
    "adagrad": adagrad_float32,
}
MISTAKES = {
    "adamw": [
        "coupled",
        "decay_last",
        "float_beta",
        "moment_stored_first",
        "late",
        "no_bias_correction",
        "eps_inside_root",
        "eps_before_correction",
        "skips_last",
    ],
    "lion": ["betas_swapped", "moment_first", "zero_is_negative"],
    "sgd_momentum": ["decoupled", "undampened", "lr_inside", "looks_ahead"],
    "rmsprop_centered": ["old_mean", "uncentered", "eps_inside_root"],
    "adagrad": ["old_sum", "late"],
}


def step_within_bounds(rule, dtype, **wrong):
    p, g, m = (hard_values((5000,), dtype, seed=seed) for seed in range(3))
    second = m.float().square().to(dtype)
    if rule == "rmsprop_centered":
        m = m / 2  # less than the root of the second moment, as a mean is
    names = zip(reference.STATES[rule], specs.RULES[rule].moments)
    states = {name: second if moment == "second" else m for name, moment in names}
    hyper = {"adamw": HYPER, "lion": LION_HYPER}.get(rule) or FUNCTION_HYPER[rule]
    expected = bounded_step(rule, p, g, states, step=3, hyper=hyper)
    floats = {name: t.float() for name, t in states.items()}
    new, new_states = IMPLEMENTATIONS[rule](p.float(), g.float(), *floats.values(), step=3, **hyper, **wrong)
    for name, value in {"param": new, **new_states}.items():
        assert_within(value.to(dtype), expected[name], name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rule", IMPLEMENTATIONS)
def test_bounds_accept_right_arithmetic(rule, dtype):
    step_within_bounds(rule, dtype)


@pytest.mark.parametrize("rule, mistake", [(rule, mistake) for rule in MISTAKES for mistake in MISTAKES[rule]])
def test_bounds_reject(rule, mistake):
    with pytest.raises(AssertionError, match="elements are wrong"):
        step_within_bounds(rule, torch.float32, **{mistake: 1})


def test_bounded_values_are_the_reference():
    p, g, *values = (normal((100,), seed=seed) for seed in range(5))
    transform = {"grad_scale": 8.0, "max_grad_value": 0.1, "clip_coef": 0.3}
    for rule, hyper in FUNCTION_HYPER.items():
        rows = zip(reference.STATES[rule], specs.RULES[rule].moments, values)
        states = {name: value.square() if moment == "second" else value for name, moment, value in rows}
        bounded = bounded_step(rule, p, g, states, step=7, maximize=True, hyper=hyper, **transform)
        param, new_states = reference.reference_step(rule, p, g, states, step=7, maximize=True, **transform, **hyper)
        for name, value in {"param": param, **new_states}.items():
            torch.testing.assert_close(bounded[name].value, value, rtol=0, atol=0)
