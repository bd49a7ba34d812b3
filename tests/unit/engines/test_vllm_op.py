"""The compiled formula against `spo.algorithms.operators`, mixed in one batch."""

from __future__ import annotations

import pytest
import torch

from spo.algorithms.operators import steer
from spo.engines.vllm_plugin import op
from spo.engines.vllm_plugin.op import LayerTables
from spo.engines.vllm_plugin.wire import OPERATOR_CODES
from spo.records import Operator
from spo.vector import SteeringVector

HIDDEN, SLOTS, TOKENS = 16, 3, 24


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
    opaque = torch.ops.spo.steer(hidden, residual, *layer_tables(tables, 1), plan, True)
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
    module.spo_gated, module.spo_capture = True, False
    module.spo_directions = module.spo_calibration = torch.zeros(2, 4)
    module.spo_scales = torch.zeros(2, 2)
    module.spo_plan = torch.zeros(8, 3, 1, dtype=torch.int32)
    state = torch.randn(3, 4)
    assert torch.equal(op.after_layer(module, (), (state, state))[1], state)
    assert torch.equal(op.after_layer(module, (), state), state)
    with pytest.raises(SteeringError, match="cannot be steered"):
        op.after_layer(module, (), (state, None))
