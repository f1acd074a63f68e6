"""The estimate of the next use: what it learns, how it merges and frees sequences, what it does when nobody asks."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from cluster.errors import ConfigError
from cluster.policies.next_use.estimate import NextUse
from cluster.policies.next_use.settings import NextUseSettings
from cluster.policies.policy_state import NUM_LEARNED
from cluster.policies.signals import GateSignal, Grid, StepSignal

GRID = Grid(layers=(0, 1, 2), num_experts=6, top_k=2)
DIM = 8


def step_of(sequences: dict[int, np.ndarray], *, num_rows: int = 1, is_decode: bool = True) -> StepSignal:
    size = len(sequences)
    return StepSignal(
        tuple(sequences), np.stack(list(sequences.values())), np.full(size, num_rows), np.full(size, is_decode)
    )


def gate_of(row: int, *chosen: tuple[int, ...]) -> GateSignal:
    """One sequence for every tuple of chosen experts."""
    counts = np.zeros((len(chosen), GRID.num_experts), np.float32)
    for sequence, experts in enumerate(chosen):
        counts[sequence, list(experts)] = 1
    return GateSignal(row, (counts * 0.4 + 0.2 / GRID.num_experts).astype(np.float32), counts, None)


def run_step(
    next_use: NextUse, vectors: dict[int, np.ndarray], *chosen: tuple[int, ...], asks: bool = True
) -> np.ndarray:
    """A decode step whose layers all choose the same; [L, E] values after it."""
    next_use.on_step(step_of(vectors))
    if asks:
        next_use.learn_from_step()
    for row in range(GRID.num_layers):
        next_use.on_gate(gate_of(row, *chosen))
    values = next_use.values().reshape(GRID.num_layers, -1).copy() if asks else np.zeros(0)
    next_use.on_step_end()
    return values


def vector(token: int) -> np.ndarray:
    return np.random.default_rng(token).standard_normal(DIM).astype(np.float32)


def test_value_approaches_the_discounted_time_to_the_next_use() -> None:
    gamma = 0.7
    next_use = NextUse(GRID, embedding_dim=DIM, settings=NextUseSettings(discount=gamma))
    values = np.zeros(0)
    for t in range(500):  # {0, 1}, {2, 3}, {0, 1}, {4, 5}, ...
        chosen = ((0, 1), (2, 3), (0, 1), (4, 5))[t % 4]
        values = run_step(next_use, {7: vector(t % 4)}, chosen)
    # seen from the last layer of the step of {4, 5}: layer 0 comes after 1/3 of a step
    expected = gamma ** (1 / 3) * np.array([1, 1, gamma, gamma, gamma**3, gamma**3])
    assert values[0] == pytest.approx(expected, abs=0.12)
    assert (np.diff(values[0][[0, 2, 4]]) < 0).all()


def test_token_of_the_step_is_known_before_its_first_gate() -> None:
    next_use, rng = NextUse(GRID, embedding_dim=DIM), np.random.default_rng(0)
    experts_of_token = [(0, 1), (2, 3), (4, 5)]
    for token in rng.integers(3, size=400):
        run_step(next_use, {1: vector(token)}, experts_of_token[token])
    for token, experts in enumerate(experts_of_token):
        next_use.on_step(step_of({1: vector(token)}))
        soon = next_use.soon()[0]
        assert (soon[:, list(experts)] > 0.6).all()
        assert np.delete(soon, experts, axis=1).max() < 0.4
        for row in range(GRID.num_layers):
            next_use.on_gate(gate_of(row, experts))
        next_use.on_step_end()


def test_of_equally_likely_experts_the_layer_that_comes_first_is_worth_most() -> None:
    next_use = NextUse(GRID, embedding_dim=DIM)
    next_use.on_step(step_of({1: vector(0)}))
    values = next_use.values().reshape(GRID.num_layers, -1)
    assert (values[0] > values[1]).all() and (values[1] > values[2]).all()
    before = values[2].copy()
    next_use.on_gate(gate_of(0, (0, 1)))
    values = next_use.values().reshape(GRID.num_layers, -1)
    assert (values[2] > before).all(), "nearer now"
    assert (values[0] < values[1]).all(), "layer 0 has passed"


def test_probability_is_calibrated_on_random_choices() -> None:
    next_use, rng = NextUse(GRID, embedding_dim=DIM), np.random.default_rng(1)
    popularity = np.array([0.45, 0.25, 0.1, 0.1, 0.06, 0.04])
    predicted, used = [], []
    for t in range(500):
        chosen = tuple(rng.choice(6, size=2, replace=False, p=popularity).tolist())
        next_use.on_step(step_of({1: vector(int(rng.integers(50)))}))
        if t > 250:
            predicted.append(next_use.soon()[0, 0].copy())
            used.append(np.isin(np.arange(6), chosen))
        next_use.learn_from_step()
        for row in range(GRID.num_layers):
            next_use.on_gate(gate_of(row, chosen))
        next_use.on_step_end()
    assert np.mean(predicted, axis=0) == pytest.approx(np.mean(used, axis=0), abs=0.05)


def test_more_sequences_make_a_use_likelier() -> None:
    next_use = NextUse(GRID, embedding_dim=DIM)
    next_use.on_step(step_of({1: vector(0)}))
    alone = next_use.hazards().copy()
    next_use.on_step(step_of({1: vector(0), 2: vector(1), 3: vector(2)}))
    assert next_use.hazards() == pytest.approx(1 - (1 - alone) ** 3, abs=1e-5)
    assert (next_use.values() < 1).all()


def test_prompt_of_many_rows_makes_a_use_likelier() -> None:
    next_use = NextUse(GRID, embedding_dim=DIM)
    next_use.on_step(step_of({1: vector(0)}))
    alone = next_use.hazards().copy()
    next_use.on_step(step_of({1: vector(0)}, num_rows=5, is_decode=False))
    assert next_use.hazards() == pytest.approx(1 - (1 - alone) ** 5, abs=1e-5)


def test_sequences_are_freed_and_their_order_does_not_matter() -> None:
    ascending, descending = NextUse(GRID, embedding_dim=DIM), NextUse(GRID, embedding_dim=DIM)
    for t in range(20):
        a, b = (t % 6, (t + 1) % 6), (5 - t % 6, (t + 2) % 6)
        values = run_step(ascending, {1: vector(t), 2: vector(t + 50)}, a, b)
        other = run_step(descending, {2: vector(t + 50), 1: vector(t)}, b, a)
        assert other == pytest.approx(values, abs=1e-4)
    assert ascending.num_sequences == 2
    ascending.on_sequence_end(1)
    ascending.on_sequence_end(2)
    ascending.on_sequence_end(3)
    assert ascending.num_sequences == 0


def test_nobody_asking_teaches_nothing() -> None:
    silent, fresh = NextUse(GRID, embedding_dim=DIM), NextUse(GRID, embedding_dim=DIM)
    for t in range(30):
        run_step(silent, {1: vector(t)}, (0, 1), asks=False)
    silent.on_sequence_end(1)
    for next_use in (silent, fresh):
        next_use.on_step(step_of({9: vector(3)}))
    assert (silent.values() == fresh.values()).all()


def test_long_embeddings_are_projected() -> None:
    next_use = NextUse(GRID, embedding_dim=DIM, settings=NextUseSettings(projected_dim=4))
    for t in range(300):
        run_step(next_use, {1: vector(t % 2)}, ((0, 1), (4, 5))[t % 2])
    next_use.on_step(step_of({1: vector(0)}))
    soon = next_use.soon()[0]
    assert (soon[:, :2] > 0.6).all() and (soon[:, 4:] < 0.4).all()


def test_layers_of_a_large_model_take_turns_in_learning() -> None:
    next_use = NextUse(GRID, embedding_dim=DIM, settings=NextUseSettings(weights_per_step=1))
    untaught = next_use.to_arrays()["soon.of_own"]
    turns: list[list[bool]] = []
    for t in range(4):  # the first one has no past to learn from
        run_step(next_use, {1: vector(t)}, (t % 6, (t + 1) % 6))
        taught_by_now = next_use.to_arrays()["soon.of_own"]
        turns.append((taught_by_now != untaught).any(axis=(1, 2)).tolist())
        untaught = taught_by_now
    assert turns == [[False] * 3, [True, False, False], [False, True, False], [False, False, True]]


@settings(max_examples=25, deadline=None)
@given(
    steps=st.lists(
        st.tuples(
            st.sets(st.integers(0, 4), min_size=1, max_size=4),
            st.booleans(),
            st.integers(0, 2**16),
            st.sampled_from([-1, 0, 2]),
            st.booleans(),
        ),
        max_size=12,
    )
)
def test_values_are_probabilities_whatever_happens(
    steps: list[tuple[set[int], bool, int, int, bool]],
) -> None:
    next_use = NextUse(GRID, embedding_dim=DIM)
    for sequences, is_decode, seed, asked_at, ends in steps:
        rng = np.random.default_rng(seed)
        vectors = {sequence: rng.standard_normal(DIM).astype(np.float32) * (seed % 3) for sequence in sequences}
        next_use.on_step(step_of(vectors, num_rows=1 if is_decode else 40, is_decode=is_decode))
        for row in range(-1, GRID.num_layers):
            if row >= 0:
                chosen = [tuple(rng.choice(6, size=2, replace=False).tolist()) for _ in sequences]
                next_use.on_gate(gate_of(row, *chosen))
            if row == asked_at:
                values, hazards = next_use.values(), next_use.hazards()
                assert np.isfinite(values).all() and (values >= 0).all() and (values <= 1).all()
                assert (hazards >= 0).all() and (hazards <= 1).all()
        next_use.on_step_end()
        if ends:
            next_use.on_sequence_end(min(sequences))


def taught(seed: int, *, num_steps: int = 300, experts: int = 0) -> NextUse:
    """Learned that of two kinds of tokens one means experts 0 and 1 (or as many further), the other 4 and 5."""
    next_use, rng = NextUse(GRID, embedding_dim=DIM), np.random.default_rng(seed)
    for token in rng.integers(2, size=num_steps):
        run_step(next_use, {1: vector(token)}, ((experts, experts + 1), (4, 5))[token])
    next_use.on_sequence_end(1)
    return next_use


def soon_of(next_use: NextUse, token: int) -> np.ndarray:
    next_use.on_step(step_of({9: vector(token)}))
    return next_use.soon()[0]


def test_state_given_to_a_fresh_one_makes_it_the_same() -> None:
    old, fresh = taught(0), NextUse(GRID, embedding_dim=DIM)
    arrays = old.to_arrays()
    fresh.load_arrays({name: array.astype(np.float16) if array.ndim else array for name, array in arrays.items()})
    assert int(fresh.to_arrays()[NUM_LEARNED]) == int(arrays[NUM_LEARNED]) == 299, "the first step has no past"
    assert soon_of(fresh, 0) == pytest.approx(soon_of(old, 0), abs=0.01)


def test_states_are_averaged_by_what_went_into_them() -> None:
    mine, other = taught(1, num_steps=31), taught(2, num_steps=91, experts=2)
    expected = {name: 0.25 * a + 0.75 * other.to_arrays()[name] for name, a in mine.to_arrays().items()}
    mine.load_arrays(other.to_arrays())
    for name, array in mine.to_arrays().items():
        if name != NUM_LEARNED:
            assert array == pytest.approx(expected[name], abs=1e-5), name
    assert int(mine.to_arrays()[NUM_LEARNED]) == 120


def test_state_is_a_copy() -> None:
    next_use = taught(3, num_steps=20)
    arrays = next_use.to_arrays()
    kept = {name: array.copy() for name, array in arrays.items()}
    run_step(next_use, {1: vector(0)}, (2, 3))
    run_step(next_use, {1: vector(1)}, (2, 3))
    assert all((arrays[name] == kept[name]).all() for name in arrays)


def test_state_of_another_model_is_refused_whole() -> None:
    arrays = NextUse(Grid(layers=(0, 1), num_experts=6, top_k=2), embedding_dim=DIM).to_arrays()
    next_use = taught(4, num_steps=20)
    before = next_use.to_arrays()
    with pytest.raises(ConfigError, match=r"popularity is of shape \(2, 6\).*need \(3, 6\)"):
        next_use.load_arrays(arrays)
    del before["worth.bias"]
    with pytest.raises(ConfigError, match=r"without worth\.bias"):
        next_use.load_arrays(before)
    assert all((next_use.to_arrays()[name] == array).all() for name, array in before.items())
