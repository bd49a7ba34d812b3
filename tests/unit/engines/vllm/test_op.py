"""The compiled formula against `spo.algorithms.operators`, mixed in one batch."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from spo.algorithms.operators import steer
from spo.engines.vllm.plugin import op
from spo.engines.vllm.plugin.op import LayerTables
from spo.engines.vllm.plugin.wire import OPERATOR_CODES
from spo.records import Operator
from spo.vector import SteeringVector

HIDDEN, SLOTS, TOKENS = 16, 3, 24
KERNEL = "spo.engines.vllm.plugin.kernel"


@pytest.fixture(autouse=True)
def on(monkeypatch):
    monkeypatch.setattr(op.SWITCH, "on", True)
    # An engine that ran in this process leaves its last step's choice of tokens.
    monkeypatch.setattr(op.SWITCH, "selection", None)


@pytest.fixture
def case():
    generator = torch.Generator().manual_seed(3)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    tables = LayerTables(
        directions=torch.zeros(2, SLOTS + 1, HIDDEN),
        calibration=torch.zeros(2, SLOTS + 1, HIDDEN),
        scales=torch.zeros(2, SLOTS + 1, 2),
    )
    vectors = {}
    for slot in range(1, SLOTS + 1):
        vectors[slot] = SteeringVector(
            layers=(1,),
            directions=normal(1, HIDDEN),
            mean_norms=torch.tensor([2.0 + slot]),
            calibration=normal(1, HIDDEN),
            model_id="m",
        )
        tables.write(slot, vectors[slot])
    return tables, vectors, normal(TOKENS, HIDDEN), normal(TOKENS, HIDDEN)


def make_plan(choices):
    plan = torch.zeros(TOKENS + 4, 3, 1, dtype=torch.int32)
    for token, (slot, coefficient, operator) in choices.items():
        plan[token, 0, 0] = slot
        plan[token, 1, 0] = torch.tensor(coefficient).view(torch.int32)
        plan[token, 2, 0] = OPERATOR_CODES[operator]
    return plan


def layer_tables(tables, layer):
    return tables.directions[layer], tables.calibration[layer], tables.scales[layer]


def test_every_token_gets_its_own_vector_coefficient_and_operator(case):
    tables, vectors, hidden, residual = case
    operators = list(Operator)
    choices = {
        t: (1 + t % SLOTS, 0.3 * (t % 5) - 0.4, operators[t % 4]) for t in range(0, TOKENS, 2)
    }
    plan = make_plan(choices)
    traced = op.steer_traced(hidden, residual, layer_tables(tables, 1), plan, True)
    opaque = residual.clone()
    torch.ops.spo.steer(hidden, opaque, *layer_tables(tables, 1), plan, True)
    for token in range(TOKENS):
        want = hidden[token] + residual[token]
        if token in choices:
            slot, coefficient, operator = choices[token]
            want = steer(
                operator,
                want,
                vectors[slot].directions[0],
                coefficient=coefficient,
                mean_norm=vectors[slot].mean_norms[0],
                calibration=vectors[slot].calibration[0],
            )
        torch.testing.assert_close(hidden[token] + traced[token], want, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(traced[token], opaque[token], atol=1e-6, rtol=1e-6)
    assert torch.equal(opaque[1::2], residual[1::2])


def test_nothing_runs_while_the_switch_is_off(case, monkeypatch):
    tables, _, hidden, residual = case
    plan = make_plan(dict.fromkeys(range(TOKENS), (1, 0.7, Operator.ADD)))
    state, pool = residual.clone(), torch.zeros(3, HIDDEN + 1)
    monkeypatch.setattr(op.SWITCH, "on", False)
    before = op.SWITCH.launches
    torch.ops.spo.steer(hidden, state, *layer_tables(tables, 1), plan, True)
    torch.ops.spo.capture(hidden, state, torch.ones(TOKENS, dtype=torch.int32), pool)
    assert torch.equal(state, residual)
    assert not pool.any()
    assert op.SWITCH.launches == before


INTERPRET = """
import sys, torch
from spo.engines.vllm.plugin.kernel import launch
cases = torch.load(sys.argv[1])
for case in cases:
    launch(case["hidden"], case["state"], case["tables"], case["plan"], True)
torch.save(cases, sys.argv[1])
"""


def test_the_gpu_kernel_equals_the_traced_formula(case, tmp_path):
    """Triton's interpreter needs to be chosen before Triton is imported: another process."""
    tables, _, hidden, residual = case
    hidden[4] = float("inf")
    cases, wanted = [], []
    for lanes, has_hidden in ((1, True), (3, True), (3, False)):
        generator = torch.Generator().manual_seed(lanes)
        shape = (TOKENS + 4, lanes)
        plan = torch.zeros(TOKENS + 4, 3, lanes, dtype=torch.int32)
        plan[:, 0] = torch.randint(0, SLOTS + 1, shape, generator=generator)
        plan[:, 1] = torch.randn(shape, generator=generator).view(torch.int32)
        plan[:, 2] = torch.randint(0, len(Operator), shape, generator=generator)
        plan[3, 0], plan[4, 1] = 0, 0
        given = (hidden if has_hidden else None, residual, layer_tables(tables, 1), plan)
        wanted.append(op.steer_traced(*given, True))
        cases.append(dict(zip(("hidden", "state", "tables", "plan"), given, strict=True)))
    cases = [{**made, "state": residual.clone()} for made in cases]
    torch.save(cases, tmp_path / "cases.pt")
    subprocess.run(
        [sys.executable, "-c", INTERPRET, str(tmp_path / "cases.pt")],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        check=True,
        timeout=120,
    )
    for made, want in zip(torch.load(tmp_path / "cases.pt"), wanted, strict=True):
        torch.testing.assert_close(made["state"], want, atol=1e-5, rtol=1e-5)
        assert torch.equal(made["state"][3:5], residual[3:5])
        assert not torch.equal(made["state"], residual)


def test_the_gpu_kernel_compiles_for_hopper(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = importlib.import_module(KERNEL)
    constants = kernel.specialise(4096, 3, True, True)
    warps = constants.pop("num_warps")
    floats, halves = ("directions", "calibration", "scales"), ("hidden", "residual")
    signature = {
        **dict.fromkeys(halves, "*bf16"),
        **dict.fromkeys(floats, "*fp32"),
        "plan": "*i32",
        **dict.fromkeys(("size", "hidden_stride", "residual_stride"), "i32"),
        **dict.fromkeys(constants, "constexpr"),
    }
    source = ASTSource(kernel.steer_kernel, signature, constants)
    binary = triton.compile(source, GPUTarget("cuda", 90, 32), options={"num_warps": warps})
    assert binary.asm["cubin"]


def test_layers_outside_the_vector_and_zero_coefficients_change_nothing(case):
    tables, _, hidden, residual = case
    hidden[3] = float("inf")
    for operator in Operator:
        on = make_plan(dict.fromkeys(range(4, TOKENS), (1, 0.7, operator)))
        other = op.steer_traced(hidden, residual, layer_tables(tables, 0), on, True)
        assert torch.equal(other, residual)
        off = make_plan(dict.fromkeys(range(TOKENS), (1, 0.0, operator)))
        same = op.steer_traced(hidden, residual, layer_tables(tables, 1), off, True)
        assert torch.equal(same, residual)


def test_add_alone_never_reads_the_hidden_state(case):
    tables, vectors, _, residual = case
    small = (tables.directions[1], torch.zeros(1, 1), tables.scales[1])
    plan = make_plan({2: (3, -1.5, Operator.ADD)})
    steered = op.steer_traced(None, residual, small, plan, False)
    torch.testing.assert_close(steered[2], residual[2] + 1.5 * vectors[3].directions[0])


def test_capture_sums_hidden_states_and_norms_by_row():
    hidden, residual = torch.randn(5, 4), torch.randn(5, 4)
    pool = torch.zeros(3, 5)
    segments = torch.tensor([0, 2, 1, 2, 0, 0, 0], dtype=torch.int32)
    torch.ops.spo.capture(hidden, residual, segments, pool)
    state = hidden + residual
    torch.testing.assert_close(pool[2, :4], state[1] + state[3])
    torch.testing.assert_close(pool[1, 4], state[2].norm())
    assert not pool[0].any()


def test_the_hook_takes_pairs_and_single_tensors_and_refuses_the_rest():
    from spo.errors import SteeringError

    module = torch.nn.Module()
    module.spo_gated, module.spo_capture, module.spo_traced = True, False, False
    module.spo_directions = module.spo_calibration = torch.zeros(2, 4)
    module.spo_scales = torch.zeros(2, 2)
    module.spo_plan = torch.zeros(8, 3, 1, dtype=torch.int32)
    state = torch.randn(3, 4)
    assert torch.equal(op.after_layer(module, (), (state, state))[1], state)
    assert torch.equal(op.after_layer(module, (), state), state)
    with pytest.raises(SteeringError, match="cannot be steered"):
        op.after_layer(module, (), (state, None))
