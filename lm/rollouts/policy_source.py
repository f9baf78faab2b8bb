"""The source of batches of a policy gradient: groups of answers that the model writes itself.

B rows, T tokens of a row, G answers of a group, N answers of a rollout, S tokens of an answer.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from lm.data.layout import BATCH, OPTIONAL, POLICY
from lm.data.problems import Problem
from lm.data.tokenizers import Tokenizer
from lm.errors import InputError
from lm.parallel.mesh import local_rows, put_batch, share
from lm.rollouts import stored_rollout
from lm.rollouts.answering import Answering, Written, of_all
from lm.rollouts.groups import chosen_groups, has_signal, rollout_metrics
from lm.rollouts.judge import Judge
from lm.rollouts.judging import Scored, score
from lm.rollouts.old_policy import NAME, make_old_log_probability
from lm.rollouts.policy_rows import answer_positions, pack, slots_of
from lm.rollouts.problem_prompts import askable, numbers_asked, prompt_of, room_for
from lm.rollouts.rounding import make_rounding
from lm.rollouts.shown import shown_answers
from lm.training.experiment import Experiment
from lm.training.sources import Spent
from lm.training.state import TrainState


class Draw(NamedTuple):
    """The groups of answers of one draw.

    Attributes:
      numbers: of the problems of all groups of all processes.
      written: answers of this process, or of all of them where groups are replaced.
      first: the number of the first group that `written` has.
      scored: rewards of all answers of all processes.
    """

    numbers: np.ndarray
    written: Written
    first: int
    scored: Scored


class PolicySource:
    """Batches of prompts with answers of the model, as they were before the step.

    A rollout asks as many problems as there is room for, G answers each, and is trained on for
    `rollouts.reuse` steps. Answer n of it is in row n // slots, whatever its length. Everything
    depends on the seed, the step and the train state alone, but for rewards that a clock decides
    (`rollouts.reward_seconds`); within the steps of one rollout the state of the source is the
    batch.

    An answer without a reward has weight 0: nothing is trained on it.
    """

    def __init__(
        self,
        built: Experiment,
        problems: Sequence[Problem],
        tokenizer: Tokenizer,
        judge: Judge,
        say: Callable[[str], None],
    ):
        """Encodes all prompts once.

        Raises:
          InputError: the problems cannot be asked, or their groups do not fit.
        """
        wanted = built.objective.batch_keys
        keys = {name for name in POLICY if name not in OPTIONAL or name in wanted}
        self.keys, self.metrics, self.spent = frozenset(BATCH) | keys, {}, Spent()
        self._built, self._tokenizer, self._judge = built, tokenizer, judge
        c, length = built.config.rollouts, built.config.data.sequence_length
        self._asked = askable(problems, tokenizer, longest_prompt(built.config))
        if dropped := self._asked.dropped:
            say(f"left out {dropped:,} of {len(problems):,} problems: their prompts are too long")
        longest = int(self._asked.lengths.max())
        self._slots = slots_of(length, longest, c.tokens)
        self._share, self._shares = share(built.mesh)
        self._groups = groups_of_rollout(built.config, self._slots, longest, self._shares)
        self._answering = Answering(
            built,
            tokenizer,
            temperature=c.temperature,
            top_p=c.top_p,
            group=c.group,
            rounding=make_rounding(built.config, built.model),
            temper=built.objective.temper,
        )
        self._left, self._rows = 0, {}
        self._old: dict[bool, Callable[..., jax.Array]] = {}

    def next(self, step: int, state: TrainState) -> dict[str, jax.Array]:
        """The batch of a step: of a new rollout, or that of the step before."""
        if not self._left:
            self._roll_out(step, state)
            self._left = self._built.config.rollouts.reuse
        if (reuse := self._built.config.rollouts.reuse) > 1:
            self.metrics = {**self.metrics, "rollout_age": np.float32(reuse - self._left)}
        self._left -= 1
        return put_batch(self._built.mesh, self._rows)

    def _roll_out(self, step: int, state: TrainState) -> None:
        """Sets the rows of this process, and the metrics of the rollout."""
        c = self._built.config.rollouts
        draws = [self._draw(step, 0, state)]
        signals = [has_signal(draws[0].scored.total_N, c.group)]
        chosen = chosen_groups(signals)
        while len(draws) <= c.dynamic and not _all_have_signal(signals, chosen):
            draws.append(self._draw(step, len(draws), state))
            signals.append(has_signal(draws[-1].scored.total_N, c.group))
            chosen = chosen_groups(signals)
        judged = [(draw.scored.total_N, draw.scored.further_NK[:, 0]) for draw in draws]
        rewards_GN, lengths_GN = (
            np.stack([judged[draw][i].reshape(-1, c.group)[group] for draw, group in chosen])
            for i in (0, 1)
        )
        numbers = np.repeat(np.arange(self._groups), c.group)
        given = rewards_GN.ravel(), numbers, lengths_GN.ravel()
        advantages = self._built.objective.advantages(*given)
        advantages_GN = np.where(np.isfinite(rewards_GN), advantages.reshape(-1, c.group), 0)
        if c.dynamic:
            advantages_GN[~has_signal(rewards_GN.ravel(), c.group)] = 0
        self._rows = self._pack(draws, chosen, rewards_GN, advantages_GN)
        if NAME in self.keys:
            self._rows[NAME] = self._old_log_probability(step, state)
        self.metrics = rollout_metrics(self._built.config, draws[0].scored, signals, chosen)

    def _draw(self, step: int, attempt: int, state: TrainState) -> Draw:
        """Asks problems that no other attempt of this rollout asks, unless there are too few."""
        built, c = self._built, self._built.config.rollouts
        number = (step // c.reuse) * (1 + c.dynamic) + attempt
        asked, seed = self._asked, built.config.train.seed
        numbers = numbers_asked(seed, number, self._groups, len(asked.kept))
        room = room_for(int(asked.lengths[numbers].max()))
        own = numbers.reshape(self._shares, -1)[self._share]
        problems = [asked.problems[i] for i in asked.kept[own]]
        prompts = [prompt_of(problem, self._tokenizer) for problem in problems]
        each = [prompt for prompt in prompts for _ in range(c.group)]
        quantized = step >= built.phases.switch
        written = self._answering(
            state.trained, quantized, each, room, step, attempt, state.objective
        )
        begin = time.perf_counter()
        records = [problem.record for problem in problems for _ in range(c.group)]
        further = np.column_stack([written.lengths_N, written.ended_N])
        scored = score(built.mesh, self._judge, written.texts, records, further)
        tokens = int(scored.further_NK[:, 0].sum())
        self.spent = _spent(self.spent, written, time.perf_counter() - begin, tokens)
        if c.dynamic:  # Whatever the processes, the same group takes the place of another one.
            return Draw(asked.kept[numbers], of_all(built.mesh, written), 0, scored)
        first = self._share * len(own)
        return Draw(asked.kept[numbers], written, first, scored)

    def _pack(self, draws, chosen, rewards_GN, advantages_GN) -> dict[str, np.ndarray]:
        """The rows of this process."""
        count, size = self._groups // self._shares, rewards_GN.shape[1]
        answers = []
        for group in range(self._share * count, (self._share + 1) * count):
            draw, place = draws[chosen[group][0]], chosen[group][1]
            number = int(draw.numbers[place])
            prompt = prompt_of(self._asked.problems[number], self._tokenizer)
            for member in range(size):
                judged = rewards_GN[group, member], advantages_GN[group, member]
                row = (place - draw.first) * size + member
                at = row, prompt, number, group
                answers.append(_positions(draw.written, self.keys, *at, *judged))
        return pack(answers, self._slots, self._built.config.data.sequence_length)

    def _old_log_probability(self, step: int, state: TrainState) -> np.ndarray:
        quantized, mesh = step >= self._built.phases.switch, self._built.mesh
        if quantized not in self._old:
            self._old = {quantized: make_old_log_probability(self._built, quantized)}
        batch = put_batch(mesh, self._rows)
        return local_rows(mesh, self._old[quantized](state.trained, batch))

    def samples(self) -> str:
        """Some answers of the last batch, with their rewards and advantages; "" before any."""
        return shown_answers(self._rows, self._tokenizer)

    def get_state(self) -> dict[str, Any]:
        """The rest of a rollout that is being trained on, nothing between two of them."""
        if not self._left:
            return {"streams": {}}
        kept = stored_rollout.encode(self._rows, self._left, self.metrics)
        return {"streams": {str(self._share): kept}}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Goes back into a rollout, whatever the number of processes that trained on it.

        Raises:
          InputError: the state is that of another source, or of other shapes.
        """
        config = self._built.config
        shape = (config.train.batch_size, config.data.sequence_length)
        rows, self._left, self.metrics = stored_rollout.decode(state, shape, self.keys)
        size = shape[0] // self._shares
        own = slice(self._share * size, (self._share + 1) * size)
        self._rows = {name: x[own] for name, x in rows.items()}

    def close(self) -> None:
        """Ends nothing: the judge is the run's."""


def longest_prompt(config: Any) -> int:
    """Tokens of a prompt at most: as configured, or what a row leaves beside an answer."""
    c = config.rollouts
    return c.longest_prompt or config.data.sequence_length - c.tokens + 1


def groups_of_rollout(config: Any, slots: int, longest: int, shares: int) -> int:
    """The number of groups of a rollout.

    Raises:
      InputError: the answers that fit are no whole number of groups in every process.
    """
    group, rows = config.rollouts.group, config.train.batch_size
    count = rows * slots
    if count % (group * shares):
        processes = f" in each of {shares} shares of the rows" if shares > 1 else ""
        raise InputError(
            f"rollouts.group={group}: the {count} answers of a rollout, {slots} in each of "
            f"train.batch_size={rows} rows of data.sequence_length={config.data.sequence_length} "
            f"(the longest prompt has {longest} tokens, rollouts.tokens={config.rollouts.tokens}), "
            f"are no whole number of groups{processes}; valid: a train.batch_size that is a "
            f"multiple of {group * shares}"
        )
    return count // group


def _spent(before: Spent, written: Written, judging: float, tokens: int) -> Spent:
    """With the seconds of one more draw."""
    spent = before._replace(judging=before.judging + judging)
    if written.compiled:
        return spent._replace(compiling=before.compiling + written.seconds)
    return spent._replace(sampling=before.sampling + written.seconds, tokens=before.tokens + tokens)


def _all_have_signal(signals: Sequence[np.ndarray], chosen: Sequence[tuple[int, int]]) -> bool:
    return all(signals[draw][group] for draw, group in chosen)


def _positions(written, keys, row, prompt, number, group, reward, advantage) -> np.ndarray:
    """One answer, number `row` of those written, to problem `number` as positions."""
    failed, drawn = not np.isfinite(reward), slice(0, written.lengths_N[row])
    further = {"temperatures": written.temperature_NS} if "temperatures" in keys else {}
    return answer_positions(
        prompt,
        written.tokens_NS[row, drawn],
        weight=0.0 if failed else 1.0,
        sample_id=number,
        group_id=group,
        advantages=advantage,
        rewards=0.0 if failed else reward,
        behaviour_log_probability=written.log_probability_NS[row, drawn],
        behaviour_entropy=written.entropy_NS[row, drawn],
        group_divergence=written.divergence_NS[row, drawn],
        **{name: x_NS[row, drawn] for name, x_NS in further.items()},
    )
