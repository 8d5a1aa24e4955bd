"""Which frame is in which slot, against a plain list of frames."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from reference.masks import block_causal_mask
from reference.window import NaiveWindow, held_frames

from vmla_convert.config import CachePolicy
from vmla_convert.layers.window import FrameWindow
from vmla_convert.maths.masks import teacher_forcing_mask


@st.composite
def policies(draw: st.DrawFn) -> CachePolicy:
    """Windows of every kind; a chunk of one frame fits beside the dense ones."""
    sink, room = draw(st.integers(0, 3)), draw(st.integers(1, 6))
    positions = draw(st.sampled_from(["absolute", "relative"]))
    assert positions in ("absolute", "relative")
    return CachePolicy(sink + room, sink, positions, draw(st.integers(0, room - 1)))


class Windows(RuleBasedStateMachine):
    """A window and its naive twin; `written` is what a buffer would hold, which moves nothing."""

    @initialize(policy=policies())
    def start(self, policy: CachePolicy) -> None:
        self.policy, self.window = policy, FrameWindow(policy)
        self.naive = NaiveWindow(
            policy.window_frames, policy.sink_frames, policy.dense_recent_frames
        )
        self.written: dict[int, int] = {}
        self.room = policy.window_frames - policy.sink_frames

    @rule(data=st.data())
    def open_a_chunk_that_fits(self, data: st.DataObject) -> None:
        frames = data.draw(st.integers(1, self.room))
        self.window.open_chunk(frames)
        self.naive.open_chunk(frames)
        self.written.update(zip(self.window.chunk_slots, self.naive.chunk, strict=True))

    @rule(data=st.data(), keep_sink=st.booleans())
    def rewind(self, data: st.DataObject, keep_sink: bool) -> None:
        near = min(3, self.naive.next_frame)
        frames = data.draw(st.integers(0, near) | st.integers(0, self.naive.next_frame))
        self.window.rewind(frames, keep_sink)
        self.naive.rewind(frames, keep_sink)

    @rule(by=st.integers(0, 2))
    def a_chunk_that_does_not_fit_is_refused(self, by: int) -> None:
        for frames in (-by, self.room + 1 + by):
            with pytest.raises(ValueError, match=f"chunk of {frames} frames"):
                self.window.open_chunk(frames)

    @rule(by=st.integers(1, 3), keep_sink=st.booleans())
    def a_rewind_to_before_the_first_frame_is_refused(self, by: int, keep_sink: bool) -> None:
        for frames in (-by, self.naive.next_frame + by):
            with pytest.raises(ValueError, match="frames back"):
                self.window.rewind(frames, keep_sink)

    @invariant()
    def both_hold_the_same(self) -> None:
        window, naive = self.window, self.naive
        slots = list(range(window.held))
        held = [self.written[slot] for slot in slots]
        assert sorted(held) == naive.held
        assert window.next_frame == naive.next_frame
        assert window.chunk_frames == naive.chunk
        assert [self.written[slot] for slot in window.chunk_slots] == naive.chunk
        assert window.recent == naive.recent
        assert sorted(self.written[slot] for slot in window.past_slots) == naive.past
        # The sink never moves, so that no entry has to.
        sink = naive.held[: self.policy.sink_frames]
        assert held[: len(sink)] == sink

        def places(frames: list[int]) -> list[int]:
            return (
                frames
                if self.policy.frame_positions == "absolute"
                else list(map(naive.held.index, frames))
            )

        assert window.frame_positions(slots) == places(held)
        past = [self.written[slot] for slot in window.past_slots]
        assert window.frame_positions(window.past_slots) == places(past)
        assert window.own_positions() == places(naive.recent + naive.chunk)


TestWindows = Windows.TestCase
TestWindows.settings = settings(
    derandomize=True, deadline=None, max_examples=25, stateful_step_count=60
)


def test_the_worked_example_of_the_module() -> None:
    absolute, relative = (
        FrameWindow(CachePolicy(6, 2, positions)) for positions in ("absolute", "relative")
    )
    slots = list(range(6))
    for first in (0, 2, 4):
        for window in (absolute, relative):
            window.open_chunk(2)
            assert window.chunk_frames == [first, first + 1]
    assert absolute.frame_positions(slots) == [0, 1, 2, 3, 4, 5]
    assert relative.frame_positions(slots) == [0, 1, 2, 3, 4, 5]
    for window in (absolute, relative):
        window.open_chunk(2)
        assert window.chunk_slots == [2, 3]
        assert window.past_slots == [0, 1, 4, 5]
    assert absolute.frame_positions(slots) == [0, 1, 6, 7, 4, 5]
    assert relative.frame_positions(slots) == [0, 1, 4, 5, 2, 3]
    assert absolute.own_positions() == [6, 7]
    assert relative.own_positions() == [4, 5]


@given(policies(), st.integers(1, 6), st.integers(1, 6))
def test_a_masked_pass_attends_to_what_the_window_holds(
    policy: CachePolicy, chunk: int, chunks: int
) -> None:
    chunk = min(chunk, policy.window_frames - policy.sink_frames)
    frames, window = chunk * chunks, FrameWindow(policy)
    visible, dense, _ = block_causal_mask(frames, chunk, 1, policy)
    forced_visible, forced_dense, _ = teacher_forcing_mask(frames, chunk, 1, policy)
    for _ in range(chunks):
        window.open_chunk(chunk)
        own, recent = window.chunk_frames, window.recent
        past = {*held_frames(own[-1] + 1, policy.window_frames, policy.sink_frames)} - {*own}
        for query in own:
            assert {*visible[query].nonzero().flatten().tolist()} == {*own, *past}
            assert {*dense[query].nonzero().flatten().tolist()} == {*own, *recent}
            # Noisy queries attend to their own noisy frames and to the clean past.
            for row, half in ((query, 0), (frames + query, frames)):
                noisy = {half + frame for frame in own}
                assert {*forced_visible[row].nonzero().flatten().tolist()} == noisy | past
                assert {*forced_dense[row].nonzero().flatten().tolist()} == noisy | {*recent}
