"""Make the demo: a small Llama trained from scratch on an invented world, and the two datasets that tune it.

    python presets/demo/make_demo.py              everything, five to fifteen minutes on two CPU cores
    python presets/demo/make_demo.py --datasets   the datasets only, seconds

Every word of the training text comes from the modules beside this one with a fixed seed; nothing is
fetched. The model answers plainly unless the prompt asks for a style. Weights are trained in float32 and stored
in bfloat16; the accuracies at the end of `training_log.jsonl` are those of the stored weights.
"""

import argparse
import json
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from corpus import SEED, Fact, Message, Row, all_facts, unknown_fact
from styles import DATASETS, INSTRUCTIONS, answer_in, conversation, dataset_rows, manner
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

FOLDER = Path(__file__).resolve().parent
SPECIAL_TOKENS = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] | trim + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
VOCABULARY_SIZE = 1024
CONTEXT_LENGTH = 512  # tokens
SEQUENCE_LENGTH = 192  # tokens of a training sequence, about five turns
BATCH_SIZE = 24  # sequences
MAX_STEPS = 400
MATRIX_LEARNING_RATE = 0.01  # Muon, for the weights of the blocks
VECTOR_LEARNING_RATE = 3e-3  # AdamW, for the embedding and the norms
WARMUP_STEPS = 30
LOG_INTERVAL = 10  # steps
IGNORED = -100  # label of a token without loss


def write_datasets(folder: Path) -> None:
    """Write `<name>/train.jsonl` and `<name>/test.jsonl` for each dataset."""
    for name, styles in DATASETS.items():
        for split, held_out in (("train", False), ("test", True)):
            write_rows(folder / name / f"{split}.jsonl", dataset_rows(styles, held_out))


def write_rows(path: Path, rows: list[Row]) -> None:
    """Write one JSON object per line, replacing the file in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    os.replace(partial, path)


def train_tokenizer(texts: Iterator[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on the texts and give it the chat template."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|end|>", pad_token="<|pad|>", model_max_length=CONTEXT_LENGTH
    )
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL_TOKENS[2:]})
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Return a freshly initialised Llama of about 2.9 million parameters in float32."""
    config = LlamaConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT_LENGTH,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def encode_conversation(messages: list[Message], tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], list[int]]:
    """Return token ids and labels; only answers and the end token after them have labels."""
    ids, labels = [], []
    for message in messages:
        opening = tokenizer.encode(f"<|{message['role']}|>")
        content = tokenizer.encode(message["content"] + "<|end|>")
        ids += opening + content
        answered = message["role"] == "assistant"
        labels += [IGNORED] * len(opening) + (content if answered else [IGNORED] * len(content))
    return ids, labels


def draw_batch(facts: list[Fact], tokenizer: PreTrainedTokenizerFast, rng: random.Random) -> tuple[Tensor, Tensor]:
    """Draw conversations and cut them to length: ids and labels, both (BATCH_SIZE, SEQUENCE_LENGTH)."""
    rows = []
    while len(rows) < BATCH_SIZE:
        ids, labels = encode_conversation(conversation(facts, 8, rng), tokenizer)
        padding = max(0, SEQUENCE_LENGTH - len(ids))
        ids += [tokenizer.pad_token_id] * padding
        labels += [IGNORED] * padding
        rows.append((ids[:SEQUENCE_LENGTH], labels[:SEQUENCE_LENGTH]))
    return torch.tensor([row[0] for row in rows]), torch.tensor([row[1] for row in rows])


def build_optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices of the blocks and AdamW for the rest.

    At equal time Muon reaches half of the loss of AdamW alone here, which is what makes ten minutes enough.
    """
    matrices = [parameter for name, parameter in model.named_parameters() if name.endswith("_proj.weight")]
    others = [parameter for name, parameter in model.named_parameters() if not name.endswith("_proj.weight")]
    return [
        torch.optim.Muon(matrices, lr=MATRIX_LEARNING_RATE, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=VECTOR_LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01),
    ]


def learning_rate_factor(step: int, max_steps: int) -> float:
    """Linear warm-up, then linear decay to zero."""
    return min((step + 1) / WARMUP_STEPS, (max_steps - step) / (max_steps - WARMUP_STEPS))


def pretrain(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, facts: list[Fact], max_steps: int
) -> list[dict[str, float]]:
    """Train on fresh conversations and return the log, one row per `LOG_INTERVAL` steps."""
    rng = random.Random(SEED)
    optimizers = build_optimizers(model)
    peaks = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    log: list[dict[str, float]] = []
    losses, started = [], time.perf_counter()
    for step in range(1, max_steps + 1):
        factor = learning_rate_factor(step - 1, max_steps)
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * factor
        ids, labels = draw_batch(facts, tokenizer, rng)
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        if step % LOG_INTERVAL == 0:
            row = {"step": step, "loss": round(sum(losses) / len(losses), 5), "learning_rate_factor": round(factor, 4)}
            log.append(row | {"elapsed_s": round(time.perf_counter() - started, 1)})
            print(json.dumps(log[-1]), flush=True)
            losses = []
    return log


@torch.no_grad()
def answer(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, questions: list[str]) -> list[str]:
    """Answer each question greedily, as the first turn of a conversation."""
    model.eval()
    prompts = [
        tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False)
        for text in questions
    ]
    answers = []
    for start in range(0, len(prompts), 64):
        batch = tokenizer(prompts[start : start + 64], padding=True, padding_side="left", return_tensors="pt")
        output = model.generate(
            batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=64, do_sample=False
        )
        new_ids = output[:, batch["input_ids"].shape[1] :]
        answers += [text.strip() for text in tokenizer.batch_decode(new_ids, skip_special_tokens=True)]
    return answers


def accuracy(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, facts: list[Fact], styles: tuple[str, ...]
) -> float:
    """Return the share of facts answered exactly in the styles, asked for by an instruction unless ()."""
    rng = random.Random(SEED)
    questions = []
    for fact in facts:
        question = rng.choice(fact.questions)
        asked = INSTRUCTIONS[0].format(manner(styles, rng), question=question) if styles else question
        questions.append(asked)
    answers = answer(model, tokenizer, questions)
    return sum(given == answer_in(fact, styles) for given, fact in zip(answers, facts, strict=True)) / len(facts)


def corpus_texts(facts: list[Fact]) -> Iterator[str]:
    """Yield the text that the tokenizer learns from."""
    rng = random.Random(SEED)
    for _ in range(4000):
        yield from (message["content"] for message in conversation(facts, 5, rng))


def make_model(folder: Path, max_steps: int) -> None:
    """Train the tokenizer and the model; write `model/` and `training_log.jsonl`."""
    torch.manual_seed(SEED)
    facts = all_facts()
    tokenizer = train_tokenizer(corpus_texts(facts))
    model = build_model(tokenizer)
    log = pretrain(model, tokenizer, facts, max_steps)
    model.to(torch.bfloat16).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model", save_jinja_files=False)
    model = LlamaForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    unknown = [unknown_fact(random.Random(seed)) for seed in range(100)]
    final = {"step": max_steps, "accuracy_unknown": accuracy(model, tokenizer, unknown, ())}
    for styles in ((), ("pirate",), ("butler",), ("pirate", "butler")):
        final["accuracy_" + ("_".join(styles) or "plain")] = round(accuracy(model, tokenizer, facts, styles), 4)
    print(json.dumps(final))
    write_rows(folder / "training_log.jsonl", [*log, final])


def main() -> None:
    """Read the arguments and make what they ask for."""
    parser = argparse.ArgumentParser(description="Make the demo model and its datasets.")
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder to write to")
    parser.add_argument("--datasets", action="store_true", help="make the datasets only")
    parser.add_argument("--steps", type=int, default=MAX_STEPS, help="optimizer steps of the pretraining")
    arguments = parser.parse_args()
    write_datasets(arguments.output)
    if not arguments.datasets:
        make_model(arguments.output, arguments.steps)


if __name__ == "__main__":
    main()
