"""What training minimises: the answers' loss and four auxiliary ones, in one module that compiles to one graph.

Dropping keeps the graph: K kept tokens come first, the others behind them as padding that nothing sees, and the slots take
the positions that they have behind K tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from leanvlm.demo.layout import MOST_OBJECTS
from leanvlm.demo.training.batches import CAPTION_TOKENS, CONTENTS, IGNORED, NO_DIGIT, QUESTION_TOKENS, QUESTIONS
from leanvlm.demo.training.canvas import COLOR_CLASSES, NOTHING, PATCHES, SHAPE_CLASSES, PatchLabels
from leanvlm.demo.training.network import AuxiliaryHeads, Twin, normalised, slots
from leanvlm.demo.training.recipe import Recipe

__all__ = ["LOSSES", "Objective", "Tokens", "choose"]

LOSSES = ("answers", "captions", "contents", "patches", "places", "centers")
_SIDE = int(PATCHES**0.5)


class Objective(nn.Module):
    """A twin, its auxiliary heads, and their loss.

    Args:
        twin: The model.
        recipe: Gives the weights of the losses.
        head: Tokens of the prompt before the image.
        dtype: Of the residual streams: bfloat16 under autocast, or float32.
    """

    def __init__(self, twin: Twin, recipe: Recipe, head: list[int], dtype: torch.dtype) -> None:
        super().__init__()
        self.twin, self.heads = twin, AuxiliaryHeads(twin.size)
        self._recipe, self.dtype = recipe, dtype
        self.head: Tensor
        self.row: Tensor
        self.column: Tensor
        self.in_caption: Tensor
        index = torch.arange(PATCHES)
        in_caption = torch.arange(QUESTIONS * QUESTION_TOKENS + CAPTION_TOKENS) >= QUESTIONS * QUESTION_TOKENS
        self.register_buffer("head", torch.tensor(head), persistent=False)
        self.register_buffer("row", index // _SIDE, persistent=False)
        self.register_buffer("column", index % _SIDE, persistent=False)
        self.register_buffer("in_caption", in_caption.float(), persistent=False)

    def forward(
        self,
        images: Tensor,
        labels: tuple[Tensor, Tensor, Tensor, Tensor],
        scenes: tuple[Tensor, Tensor],
        asked: tuple[Tensor, Tensor],
        tokens: tuple[Tensor, Tensor, Tensor],
        patch_weight: Tensor,
        through: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the loss of a batch.

        Args:
            images: (B, 3, 336, 336) uint8.
            labels: What lies under each patch: shapes, colours, digits and centers of `PatchLabels`, each (B, N).
            scenes: Contents (B, 65) and digits (B, 4).
            asked: Token ids and targets (B, S).
            tokens: (B, N) image tokens to read, (S,) positions and (S, P + N + S) what is seen; see `Tokens`.
            patch_weight: () weight of the patches' loss.
            through: () 1 lets the answers' loss reach the tower, 0 stops it at the projector's output.

        Returns:
            () the loss; (6,) the parts of `LOSSES`, unweighted; (B, 9) bool, which slots are answered exactly.
        """
        recipe = self._recipe
        order, positions, visible = tokens
        ids, targets = asked
        states, last = self.twin.vision(normalised(images, self.dtype))
        image_tokens = self.twin.project(states).to(self.dtype)
        places, centers = self._place_losses(image_tokens, labels[3])
        # Were it not stopped when tokens are dropped, the tower would learn to smear objects over the background, and every
        # pruner would lose to chance.
        stopped = image_tokens.detach()
        image_tokens = stopped + through * (image_tokens - stopped)
        image_tokens = torch.gather(image_tokens, 1, order[:, :, None].expand(-1, -1, image_tokens.shape[-1]))
        logits = self.twin.answer(self.head, image_tokens, ids, positions, visible)
        answers, captions = self._answer_losses(logits, targets)
        contents = self._contents_loss(states, last, scenes)
        patches = self._patch_loss(states, labels[:3])
        parts = torch.stack([answers, captions, contents, patches, places, centers])
        loss = (
            answers
            + recipe.caption_weight * captions
            + recipe.contents_weight * contents
            + patch_weight * patches
            + recipe.place_weight * places
            + recipe.center_weight * centers
        )
        return loss, parts.detach(), answered(logits.detach(), targets)

    def _place_losses(self, image_tokens: Tensor, centers: Tensor) -> tuple[Tensor, Tensor]:
        guesses = self.heads.place(image_tokens).float().flatten(0, 1).split(_SIDE, dim=1)
        own_row, own_column = self.row.repeat(len(image_tokens)), self.column.repeat(len(image_tokens))
        there, center = centers.flatten() != NOTHING, centers.flatten().clamp(min=0)
        wanted = (own_row, own_column, center // _SIDE, center % _SIDE)
        row, column, *of_centers = (
            functional.cross_entropy(guess, place, reduction="none") for guess, place in zip(guesses, wanted, strict=True)
        )
        return (row + column).mean(), (sum(of_centers) * there).sum() / there.sum().clamp(min=1)

    def _answer_losses(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        flat = functional.cross_entropy(logits.float().flatten(0, 1), targets.clamp(min=0).flatten(), reduction="none")
        given = (targets != IGNORED).float()
        loss, in_caption = flat.view_as(targets) * given, self.in_caption
        answers = (loss * (1 - in_caption)).sum() / (given * (1 - in_caption)).sum().clamp(min=1)
        return answers, (loss * in_caption).sum() / (given * in_caption).sum().clamp(min=1)

    def _contents_loss(self, states: Tensor, last: Tensor, scenes: tuple[Tensor, Tensor]) -> Tensor:
        contents, digits = scenes
        loss = torch.zeros((), device=states.device)
        for guess, weight in ((self.heads.last(last), 1.0), (self.heads.before_last(states[:, 0]), 0.5)):
            guess = guess.float()
            there = functional.binary_cross_entropy_with_logits(guess[:, :CONTENTS], contents)
            read = functional.cross_entropy(guess[:, CONTENTS:].reshape(-1, NO_DIGIT + 1), digits.flatten())
            loss = loss + weight * (4 * there + 0.3 * read)
        return loss

    def _patch_loss(self, states: Tensor, labels: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        guess = self.heads.patch(states[:, 1:]).float().flatten(0, 1)
        shapes, colors, digits = (label.flatten() for label in labels)
        color_at, digit_at = SHAPE_CLASSES, SHAPE_CLASSES + COLOR_CLASSES
        return (
            functional.cross_entropy(guess[:, :color_at], shapes)
            + functional.cross_entropy(guess[:, color_at:digit_at], colors)
            + functional.cross_entropy(guess[:, digit_at:], digits)
        )


def answered(logits: Tensor, targets: Tensor) -> Tensor:
    """Which slots (B, 9) greedy decoding would answer exactly: those whose every token is the likeliest."""
    right = (logits.argmax(-1) == targets) | (targets == IGNORED)
    short = right[:, : QUESTIONS * QUESTION_TOKENS].view(-1, QUESTIONS, QUESTION_TOKENS).all(-1)
    return torch.cat([short, right[:, QUESTIONS * QUESTION_TOKENS :].all(-1, keepdim=True)], dim=1)


class Tokens:
    """Which image tokens the slots see, for any number of kept ones.

    Args:
        head: Number of tokens before the image.
        device: Where the answers go.
    """

    def __init__(self, head: int, device: torch.device) -> None:
        self._head = head
        positions, visible = slots(head + PATCHES)
        self._positions, self._visible = positions.to(device), visible.to(device)

    def keep(self, order: Tensor, kept: int) -> tuple[Tensor, Tensor, Tensor]:
        """Read the first `kept` tokens of an order (B, N), in raster order.

        Returns:
            (B, N) tokens, the unseen ones last; (S,) positions; (S, P + N + S) what is seen.
        """
        order = torch.cat([order[:, :kept].sort(dim=1).values, order[:, kept:]], dim=1)
        visible = self._visible.clone()
        visible[:, self._head + kept : self._head + PATCHES] = False
        return order, self._positions - (PATCHES - kept), visible


def choose(labels: PatchLabels, generator: torch.Generator) -> Tensor:
    """Order the tokens of images by chance: (B, N) indices, first what is kept longest.

    One token of each object and of the sign comes before all others, whichever it is. So nothing that is asked about is lost
    altogether: were it, the model would learn to guess what it does not see, and to count more than it is shown.

    The others have a weight, by which chance orders them (Gumbel's trick). In a quarter of the images all have the same. In
    the rest, those under an object or a sign have e^b times the background's, where b is drawn between -1 and 6 for the image
    and varies by a standard deviation of 1 between its objects.
    """
    device, batch = labels.shapes.device, len(labels.shapes)
    things = torch.where(labels.shapes == SHAPE_CLASSES - 1, MOST_OBJECTS + 1, labels.objects)

    def drawn(columns: int) -> Tensor:
        return torch.rand(batch, columns, device=device, generator=generator)

    chance = -torch.log(-torch.log(drawn(PATCHES).clamp(1e-9, 1 - 1e-7)))
    bias = 7 * drawn(1) - 1 + torch.randn(batch, MOST_OBJECTS + 2, device=device, generator=generator)
    weight = torch.gather(bias, 1, things) * (drawn(1) < 0.75) * (things > 0)
    best = torch.full_like(bias, -torch.inf).scatter_reduce(1, things, chance, "amax")
    first = (chance == torch.gather(best, 1, things)) & (things > 0)
    return (chance + weight).masked_fill(first, torch.inf).argsort(dim=1, descending=True)
