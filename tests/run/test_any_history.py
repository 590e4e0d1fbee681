"""Saves, resumes of older steps, restarts, damage, pins and pruning in any order: resumes and deletions are right."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from modelled_run import NOW, Folder

from milepost.errors import MilepostError
from milepost.run import retention
from milepost.run.retention import Rules


@dataclass(frozen=True)
class Node:
    """A save in the model: its true parent."""

    step: int
    parent: int | None


class AnyHistory(RuleBasedStateMachine):
    """Any order of these steps, compared with a tree of all saves."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Folder()
        self.nodes: list[Node] = []
        self.at: dict[int, int] = {}  # step -> the node saved there
        self.run: int | None = None  # the node that the run is at
        self.is_running = False
        self.resumed: int | None = None
        self.command = -1

    def line(self, node: int | None) -> list[int]:
        found = []
        while node is not None:
            found.append(node)
            node = self.nodes[node].parent
        return found

    def loadable(self, step: int) -> bool:
        return self.folder.steps[step].is_resumable

    def there(self, node: int) -> bool:
        return self.at.get(self.nodes[node].step) == node

    def expected(self) -> int | None:
        """Return the node to resume from: the newest resumable one of the branch that was written last."""
        line = self.line(len(self.nodes) - 1 if self.nodes else None)
        return next((n for n in line if self.there(n) and self.loadable(self.nodes[n].step)), None)

    def begin(self, node: int | None) -> None:
        self.run, self.resumed, self.is_running = node, node, True

    @rule()
    @precondition(lambda self: not self.nodes)
    def start_new_run(self) -> None:
        self.folder.start_fresh()
        self.begin(None)

    @rule()
    @precondition(lambda self: self.nodes)
    def resume(self) -> None:
        expected = self.expected()
        if expected is None:
            with contextlib.suppress(MilepostError):
                self.folder.start()
                raise AssertionError("no step may be resumed without its name")
            self.is_running = False
            return
        assert self.folder.start().step == self.nodes[expected].step
        self.begin(expected)
        self.command = -1

    @rule(data=st.data(), restart=st.booleans())
    @precondition(lambda self: any(self.loadable(step) for step in self.folder.steps))
    def resume_named_step(self, data: st.DataObject, restart: bool) -> None:
        named = data.draw(st.sampled_from([step for step in self.folder.steps if self.loadable(step)]))
        chosen = self.folder.start(named, restart_branch=restart).step
        assert chosen is not None
        if restart or chosen == named:
            assert chosen == named
        else:  # only what was written last, and only if it descends from the named step
            assert self.at[named] in self.line(len(self.nodes) - 1)
            assert self.at[chosen] == self.expected()
        self.begin(self.at[chosen])
        self.command = named

    @rule(restart=st.booleans())
    @precondition(lambda self: self.command >= 0 and self.is_running and self.run != self.resumed)
    def repeat_the_command(self, restart: bool) -> None:
        """After it has saved: it goes on from there, if that can be loaded."""
        wanted = self.run
        assert wanted is not None
        if self.there(wanted) and self.loadable(self.nodes[wanted].step):
            assert self.folder.start(self.command).step == self.nodes[wanted].step
            self.begin(wanted)

    @rule(stride=st.integers(1, 4))
    @precondition(lambda self: self.is_running)
    def save(self, stride: int) -> None:
        step = (self.nodes[self.run].step if self.run is not None else 0) + stride
        self.folder.save(step)
        self.nodes.append(Node(step, self.run))
        self.run = self.at[step] = len(self.nodes) - 1

    @rule()
    def kill(self) -> None:
        self.is_running, self.resumed = False, None

    @rule(data=st.data(), torn=st.booleans())
    @precondition(lambda self: self.folder.steps)
    def damage(self, data: st.DataObject, torn: bool) -> None:
        step = data.draw(st.sampled_from(sorted(self.folder.steps)))
        lineage = self.folder.steps[step].lineage
        (self.folder.tear if torn else self.folder.damage)(step)
        self.folder.steps[step] = replace(self.folder.steps[step], lineage=lineage)

    @rule(data=st.data())
    @precondition(lambda self: self.folder.steps)
    def pin(self, data: st.DataObject) -> None:
        step = data.draw(st.sampled_from(sorted(self.folder.steps)))
        self.folder.steps[step] = replace(self.folder.steps[step], pinned=True)

    @rule(k=st.integers(1, 4), every=st.integers(0, 3))
    @precondition(lambda self: self.is_running and self.run is not None and self.run != self.resumed)
    def prune(self, k: int, every: int) -> None:
        """As after each commit of the run."""
        protected = {} if self.resumed is None else {self.nodes[self.resumed].step: "this run resumed from it"}
        before, latest = dict(self.folder.steps), self.expected()
        decisions = retention.plan(
            self.folder.entries, Rules(keep_latest_k=k, keep_every_n=every, protected=protected), now=NOW
        )
        gone = {decision.step for decision in decisions if not decision.keep}
        assert all(before[step].state == "committed" and not before[step].pinned for step in gone)
        assert not gone & protected.keys()
        line = self.line(len(self.nodes) - 1)
        if latest is not None:
            assert self.nodes[latest].step not in gone
        if latest is None or latest == self.resumed:  # nothing newer of this branch is durable: all else stays too
            assert all(self.at[step] in line for step in gone)
        own = [n for n in line if self.there(n) and before[self.nodes[n].step].state == "committed"]
        assert not gone & {self.nodes[n].step for n in own[:k]}
        if any(self.at[step] in own for step in gone):  # then no abandoned step is left but by right
            left = {step for step in before.keys() - gone if self.at[step] not in line}
            assert all(before[step].pinned or before[step].state == "damaged" or step in protected for step in left)
        for step in gone:
            del self.folder.steps[step], self.at[step]

    @invariant()
    def the_history_is_the_true_one(self) -> None:
        line = self.line(len(self.nodes) - 1 if self.nodes else None)
        # What was written last may be gone (replaced, torn): then its line is that of what is left, at the most.
        if self.nodes and self.there(len(self.nodes) - 1):
            history = self.folder.history
            assert {self.at[entry.step] for entry in history.current} == {n for n in line if self.there(n)}
            assert {self.at[entry.step] for entry in history.abandoned} == {
                n for n in self.at.values() if n not in line
            }


TestAnyHistory = AnyHistory.TestCase
TestAnyHistory.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
