"""Compare pruners on the checkpoint itself, in torch: many methods and budgets without exporting a bundle for each.

A scene's image is encoded once and serves every method. For one method and budget all questions about a scene go through the
decoder in one pass, side by side behind the same image tokens, with their right answers appended: if the most likely token is
the right one at every position of an answer, its end included, then greedy decoding gives exactly that answer, and only then.
Captions that fail this test are generated, since how they fail counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from leanvlm.calibration.evaluate import LONG, Exam
from leanvlm.calibration.scores import Result, Scores, score_caption
from leanvlm.calibration.vision import VisionSide
from leanvlm.demo.render import render
from leanvlm.demo.scenes import Question, Scene
from leanvlm.exporter.checkpoint import Checkpoint
from leanvlm.exporter.decoders import token_rows
from leanvlm.exporter.plan import pruner_for
from leanvlm.exporter.pruners import parse
from leanvlm.exporter.pruners.base import Pruner, ScoredBlock
from leanvlm.exporter.pruners.gates import attention_entropy, exact_effective_rank
from leanvlm.runtime.errors import InputError, UnsupportedModelError
from leanvlm.runtime.layout import Layout
from leanvlm.runtime.session import user_message
from leanvlm.runtime.text import Template, TextTokenizer

IGNORED = -100
# Scenes at a time: captions are generated together, and each step costs nearly the same for one as for all.
BATCH = 25

Step = Callable[[str, int], None]


@dataclass(frozen=True)
class Study:
    """What a study found.

    Attributes:
        results: One for each method, budget and kind of scenes.
        complexity: Kind of scenes to exact effective ranks and attention entropies (nats), one each a scene.
    """

    results: list[Result]
    complexity: dict[str, dict[str, list[float]]]


@dataclass(frozen=True)
class Script:
    """The questions about one scene as tokens, laid side by side behind the prompt's common beginning.

    Attributes:
        ids: (T,) the questions' endings and right answers, one after the other.
        targets: (T,) the right next token where an answer is being given, `IGNORED` elsewhere.
        question: (T,) which question each position belongs to, from 1.
        offset: (T,) how far each position is from its question's beginning.
    """

    ids: Tensor
    targets: Tensor
    question: Tensor
    offset: Tensor


class Examinee:
    """A checkpoint that answers in torch, in fp32.

    Attributes:
        side: Its vision side.
    """

    def __init__(self, checkpoint: Checkpoint, model: nn.Module) -> None:
        self.side = VisionSide(checkpoint, model.float())
        self._decoder: Any = checkpoint.family.parts(model).decoder
        self._table = token_rows(self._decoder)
        self._tokenizer = TextTokenizer.from_folder(checkpoint.folder)
        self._template = Template.from_folder(checkpoint.folder)
        self._image_token = checkpoint.spec.image_token_id
        end: Any = GenerationConfig.from_pretrained(checkpoint.folder).eos_token_id
        self._ends = [end] if isinstance(end, int) else list(end)
        # What stands before the image is the same for every question.
        self._before = self._table[self._split(user_prompt(self._template, "?"))[0]]

    def script(self, questions: Sequence[Question]) -> Script:
        """Lay out the questions about one scene."""
        ids: list[int] = []
        targets: list[int] = []
        numbers: list[int] = []
        offsets: list[int] = []
        for number, question in enumerate(questions, 1):
            ending, answer = self._ending(question.text), self._answer(question)
            ids += [*ending, *answer[:-1]]
            targets += [*[IGNORED] * (len(ending) - 1), *answer]
            numbers += [number] * (len(ending) + len(answer) - 1)
            offsets += range(len(ending) + len(answer) - 1)
        return Script(*(torch.tensor(values) for values in (ids, targets, numbers, offsets)))

    @torch.no_grad()
    def check(self, embeddings: Tensor, scripts: Sequence[Script]) -> list[list[bool]]:
        """Say which questions greedy decoding answers exactly.

        Args:
            embeddings: (B, K, D), kept image tokens of B scenes.
            scripts: B of them.

        Returns:
            One list a scene, in the order of its questions.
        """
        prefix = torch.cat([self._before.expand(len(scripts), -1, -1), embeddings], dim=1)
        ids, targets, question, offset = (
            nn.utils.rnn.pad_sequence([getattr(script, name) for script in scripts], batch_first=True, padding_value=padding)
            for name, padding in (("ids", 0), ("targets", IGNORED), ("question", 0), ("offset", 0))
        )
        length = prefix.shape[1]
        states = self._decoder.model(
            inputs_embeds=torch.cat([prefix, self._table[ids]], dim=1),
            attention_mask=_side_by_side(question, length),
            position_ids=torch.cat([torch.arange(length).expand(len(scripts), -1), length + offset], dim=1),
            use_cache=False,
        ).last_hidden_state[:, length:]
        asked = targets != IGNORED
        wrong = torch.zeros_like(asked)
        wrong[asked] = self._decoder.lm_head(states[asked]).argmax(dim=1) != targets[asked]
        return [
            [not bool((wrong[row] & (question[row] == number)).any()) for number in range(1, int(script.question.max()) + 1)]
            for row, script in enumerate(scripts)
        ]

    @torch.no_grad()
    def generate(self, embeddings: Tensor, questions: Sequence[str]) -> list[str]:
        """Answer one question about each of B scenes greedily, from their kept image tokens (B, K, D)."""
        endings = [torch.tensor(self._ending(question)) for question in questions]
        prompts = [torch.cat([self._before, *pair]) for pair in zip(embeddings, (self._table[e] for e in endings), strict=True)]
        inputs = nn.utils.rnn.pad_sequence(prompts, batch_first=True, padding_side="left")
        there = nn.utils.rnn.pad_sequence([torch.ones(len(p), dtype=torch.long) for p in prompts], True, 0, "left")
        out = self._decoder.generate(
            inputs_embeds=inputs,
            attention_mask=there,
            max_new_tokens=LONG,
            do_sample=False,
            eos_token_id=self._ends,
            pad_token_id=self._ends[0],
        )
        return [self._tokenizer.decode(row).strip() for row in out.tolist()]

    def _split(self, prompt: str) -> list[list[int]]:
        return split_on_image(self._tokenizer.encode(prompt), self._image_token)

    def _ending(self, question: str) -> list[int]:
        """Tokens of a prompt behind its image."""
        return self._split(user_prompt(self._template, question))[1]

    def _answer(self, question: Question) -> list[int]:
        """Tokens of the right answer, its end included."""
        prompt, ending = user_prompt(self._template, question.text), self._ending(question.text)
        whole = self._split(f"{prompt} {question.answer}")[1]
        if whole[: len(ending)] != ending:
            raise UnsupportedModelError("the tokenizer of this model joins the prompt's end with the answer's beginning")
        return [*whole[len(ending) :], self._ends[0]]


def user_prompt(template: Template, question: str) -> str:
    """Return the prompt that asks a question about one image."""
    return template.render([user_message(question, 1)])


def _side_by_side(question: Tensor, prefix: int) -> Tensor:
    """Attention mask (B, 1, S, S) to add: a token sees the prefix and, of the rest, only its own question up to itself."""
    number = nn.functional.pad(question, (prefix, 0))  # 0 in the prefix
    position = torch.arange(number.shape[1])
    shared = (position < prefix)[None, None, :]
    visible = (position[None, :] <= position[:, None]) & (shared | (number[:, :, None] == number[:, None, :]))
    return torch.where(visible, 0.0, torch.finfo(torch.float32).min)[:, None]


def run_study(
    examinee: Examinee, exam: Exam, methods: Sequence[str], budgets: Sequence[int], on_step: Step = lambda text, count: None
) -> Study:
    """Evaluate pruners at several budgets, and the unpruned model beside them.

    Args:
        examinee: The model.
        exam: The scenes.
        methods: Pruners as spec strings; `none` stands for the unpruned model and is added.
        budgets: Image tokens kept, each at least 1 and under N.
        on_step: Told what is done, and how many scenes and methods more, for a progress display.

    Raises:
        UnsupportedModelError: A model whose images are more in a prompt than one crop's tokens.
        UnsupportedPrunerError: A pruner that is not known.
        InputError: A budget that is not possible.
    """
    pruners = pruners_of(examinee.side.checkpoint, methods, budgets)
    with _one_thread_an_operator(), ThreadPoolExecutor(len(exam.kinds)) as pool:
        parts = list(pool.map(lambda kind: _study_kind(examinee, replace(exam, kinds=(kind,)), pruners, on_step), exam.kinds))
    return Study([result for part in parts for result in part.results], {k: v for p in parts for k, v in p.complexity.items()})


@contextmanager
def _one_thread_an_operator() -> Iterator[None]:
    """Leave the cores to the kinds of scenes, one each: at these sizes an operator's threads mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _study_kind(examinee: Examinee, exam: Exam, pruners: dict[tuple[str, int], Pruner], on_step: Step) -> Study:
    """Study the scenes of one kind."""
    scores = {key: Scores() for key in pruners}
    complexity: dict[str, list[float]] = {"effective_rank": [], "entropy": []}
    blocks: dict[ScoredBlock, None] = {"feature": None, **{pruner.scored_block: None for pruner in pruners.values()}}
    for kind, scenes in exam.batches(BATCH):
        images = render(scenes)
        tokens = {block: examinee.side.tokens(images, block) for block in blocks}
        complexity["effective_rank"] += exact_effective_rank(tokens["feature"].patches.features).tolist()
        complexity["entropy"] += attention_entropy(tokens["feature"].patches.saliency).tolist()
        asked = [exam.questions(scene) for scene in scenes]
        scripts = [examinee.script([*short, caption] if caption else short) for short, caption in asked]
        for (name, budget), pruner in pruners.items():
            kept = examinee.side.keep(pruner, tokens[pruner.scored_block])
            _grade(examinee, kept, list(zip(scenes, asked, scripts, strict=True)), scores[name, budget])
            on_step(f"{kind} scenes", len(scenes))
    source, kind = examinee.side.checkpoint.name, exam.kinds[0]
    results = [Result(name, budget, kind, found, source) for (name, budget), found in scores.items()]
    return Study(results, {kind: complexity})


def pruners_of(checkpoint: Checkpoint, methods: Sequence[str], budgets: Sequence[int]) -> dict[tuple[str, int], Pruner]:
    """Return (method, budget) to pruner for what a study compares; see `run_study`."""
    frame, count = checkpoint.frame, checkpoint.spec.tokens_per_crop
    if frame.crops.kind != "whole" or frame.layout != Layout():
        raise UnsupportedModelError(
            f"{checkpoint.name} cuts images into crops or puts marks around them, which only its bundles are evaluated with: "
            "leanvlm export it, then leanvlm eval the bundle"
        )
    for budget in budgets:
        if not 1 <= budget < count:
            raise InputError(f"budget {budget} is not possible in a comparison; give numbers from 1 to {count - 1}")
    pruners: dict[tuple[str, int], Pruner] = {("none", count): parse("none", keep=count - checkpoint.spec.leading)}
    for method in methods:
        if method.partition(":")[0] != "none":
            for budget in budgets:
                pruners[method, budget] = pruner_for(method, checkpoint.spec, budget, erank_ref=checkpoint.erank_ref)
    return pruners


Asked = tuple[Scene, tuple[list[Question], Question | None], Script]


def _grade(examinee: Examinee, kept: Tensor, asked: Sequence[Asked], scores: Scores) -> None:
    """Count the answers to some scenes' questions from their kept tokens (B, K, D)."""
    exact = examinee.check(kept, [script for *_, script in asked])
    captions: dict[int, str] = {}
    for row, ((_, (short, caption), _), right) in enumerate(zip(asked, exact, strict=True)):
        scores.add_scene([(question.kind, outcome) for question, outcome in zip(short, right, strict=False)])
        if caption is not None:
            captions[row] = caption.answer if right[-1] else ""
    unlike = [row for row, text in captions.items() if not text]
    if unlike:
        texts = [question.text for row in unlike if (question := asked[row][1][1])]
        captions.update(zip(unlike, examinee.generate(kept[unlike], texts), strict=True))
    scores.captions += [score_caption(text, asked[row][0]) for row, text in captions.items()]


def split_on_image(ids: Sequence[int], image_token_id: int) -> list[list[int]]:
    """Cut a prompt where images go.

    Args:
        ids: Token ids with one image token for each image.
        image_token_id: The image token.

    Returns:
        The segments of text between the images: one more than there are image tokens, and possibly empty.
    """
    segments: list[list[int]] = [[]]
    for token_id in ids:
        if token_id == image_token_id:
            segments.append([])
        else:
            segments[-1].append(token_id)
    return segments
