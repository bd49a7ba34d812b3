"""What the vision-language model is trained for, and the reading exam along the way."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from spo.testbed import scenes
from spo.testbed.model import chat_prompt
from spo.testbed.training.distillation import TextBatch
from spo.testbed.training.vlm_data import IGNORED, NO_LETTER, Sample, encode
from spo.testbed.training.vlm_network import VisionLanguageModel

# Most patches hold no letter; at full weight that is all the letter head would learn to say.
_NO_LETTER_WEIGHT = 0.1


def answer_loss(student: VisionLanguageModel, hidden: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of the learned tokens; a sample of n tokens weighs as the square root of n.

    `hidden` [batch, length, width]; `labels` [batch, length] with `IGNORED` where nothing is
    learned. Short answers (a word) would drown among captions if every token weighed the same.
    """
    targets = labels[:, 1:]
    learned = targets != IGNORED
    counts = learned.sum(dim=1, keepdim=True).clamp(min=1)
    weights = counts.float().rsqrt().expand_as(targets)[learned]
    losses = F.cross_entropy(
        student.logits(hidden[:, :-1][learned]).float(), targets[learned], reduction="none"
    )
    return (losses * weights).sum() / weights.sum()


def letter_loss(logits: Tensor, letters: Tensor) -> Tensor:
    """Cross-entropy of the letters [batch, 49, 2] under logits [batch, 49, 2, 27]."""
    weight = torch.ones(NO_LETTER + 1, device=logits.device)
    weight[NO_LETTER] = _NO_LETTER_WEIGHT
    return F.cross_entropy(
        logits.float().flatten(0, 2), letters.flatten(), weight=weight, ignore_index=IGNORED
    )


def word_exam(
    tokenizer: PreTrainedTokenizerBase, *, unseen: bool, count: int = 256
) -> dict[str, Tensor]:
    """Unseen scenes with the question for their English word, encoded like training batches."""
    rng = scenes.evaluation_generator(7)
    samples = []
    for _ in range(count):
        scene = scenes.sample_scene(rng, word_share=1.0, string_share=0.0, unseen_words=unseen)
        question = scenes.questions(scene)[-1]
        segments = (
            (chat_prompt(question.text), False),
            (f"{question.sentence}<|im_end|>", True),
        )
        samples.append(Sample(image=scenes.draw(scene), segments=segments, glyphs=()))
    return encode(samples, tokenizer)


@torch.no_grad()
def exam_result(student: VisionLanguageModel, exam: dict[str, Tensor]) -> float:
    """Share of answers whose every token is the likeliest one (the right ones before it given)."""
    device = student.device
    images, ids, labels = (exam[name].to(device) for name in ("images", "ids", "labels"))
    # Another batch size would compile the blocks once more.
    with torch.compiler.set_stance("force_eager"):
        hidden, _ = student(images, ids)
    targets = labels[:, 1:]
    learned = targets != IGNORED
    right = torch.ones_like(targets, dtype=torch.bool)
    right[learned] = student.logits(hidden[:, :-1][learned]).argmax(dim=-1) == targets[learned]
    return float(right.all(dim=1).float().mean())


def text_loss(
    student: VisionLanguageModel,
    hidden: Tensor,
    positions: Tensor,
    teacher: LlamaForCausalLM,
    batch: TextBatch,
) -> Tensor:
    """Mean KL from the original model to the adapted one over the texts' tokens.

    `hidden` [batch, length, width] of the adapted model; `positions` [batch, text length] says
    where in it each token of the text stands.
    """
    with torch.no_grad():
        original = teacher.model(input_ids=batch.ids, use_cache=False).last_hidden_state
        wanted = F.linear(original[batch.mask], teacher.model.embed_tokens.weight).float()
        wanted = F.log_softmax(wanted, dim=-1)
    places = positions.unsqueeze(-1).expand(-1, -1, hidden.shape[-1])
    given = student.logits(torch.gather(hidden, 1, places)[batch.mask]).float()
    given = F.log_softmax(given, dim=-1)
    return F.kl_div(given, wanted, reduction="sum", log_target=True) / batch.mask.sum()
