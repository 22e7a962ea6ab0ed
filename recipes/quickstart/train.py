"""Train the quickstart model: a 5.8M-parameter LLaMA with grouped-query attention, in 90 s on one H100.

    python recipes/quickstart/corpus.py                # once: .corpus/train.txt and the held-out text
    python recipes/quickstart/train.py --prepare       # once: tokenizer, .corpus/train.npy
    python recipes/quickstart/train.py                 # train, save, evaluate
    python recipes/quickstart/train.py --evaluate      # only the numbers of the saved model

A smoke test on a CPU, once the tokenizer files are copied to the folder it writes:

    train.py --device cpu --no-compile --steps 3 --batch 2 --length 128 --out /tmp/smoke

A training sequence is `<s>` followed by a stretch of the token stream, in which documents are joined by
`</s><s>`. Weights are kept in fp32, products are taken in bf16 (autocast), and the checkpoint of the lowest
loss on `calibration.txt` is saved in fp16; `evaluation.txt` is read once, after training, for the numbers
of the model card.

Perplexity is `exp(mean −ln p)` over non-overlapping windows of 512 positions, `<s>` and 511 tokens of the
text, all 511 predicted; a shorter rest is left out. The unigram perplexity gives the same tokens the
frequency they have in the training stream (plus one). Seeds fix the order of the data and the initial
weights; GPU kernels need not be bitwise reproducible.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

HERE = Path(__file__).resolve().parent
BOS, EOS, VOCAB = 0, 1, 4096
WINDOW = 512  # positions of an evaluation window, <s> included


def config(length: int) -> LlamaConfig:
    """Every linear layer has K % 128 == 0 and N % 64 == 0, so that all of them can be packed as 2:4."""
    return LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=length,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=EOS,
    )


def prepare(corpus: Path, out: Path, length: int) -> None:
    """Train the byte-level BPE tokenizer on the training text, save it, and write the stream as uint16."""
    documents = (corpus / "train.txt").read_text(encoding="utf-8").split("\n\f\n")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    ids = [np.array([*e.ids, EOS, BOS], dtype=np.uint16) for e in tokenizer.encode_batch(documents)]
    np.save(corpus / "train.npy", np.concatenate(ids))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        model_max_length=length,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(out)
    settings = json.loads((out / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # the name that transformers 4 knows as well
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    print(f"tokenizer: {tokenizer.get_vocab_size()} entries; training stream: {sum(map(len, ids)):,} tokens")


def encode(text: Path, model: Path) -> np.ndarray:
    """Token ids of a text file, without `<s>`."""
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    return np.array(tokenizer.encode(text.read_text(encoding="utf-8"), add_special_tokens=False).ids)


def windows(ids: np.ndarray) -> torch.Tensor:
    """`[W, 512]` evaluation windows, each `<s>` and 511 tokens."""
    rows = torch.tensor(ids[: len(ids) // (WINDOW - 1) * (WINDOW - 1)]).view(-1, WINDOW - 1)
    return F.pad(rows, (1, 0), value=BOS)


def batches(stream: torch.Tensor, length: int, batch: int, seed: int) -> Iterator[torch.Tensor]:
    """Endless `[batch, length]` sequences; every pass shifts the cuts and shuffles the sequences."""
    generator = torch.Generator().manual_seed(seed)
    step = length - 1
    while True:
        shift = int(torch.randint(step, (1,), generator=generator))
        count = (len(stream) - shift) // step
        rows = stream[shift : shift + count * step].view(count, step)
        order = torch.randperm(count, generator=generator).to(stream.device)
        for chunk in order.split(batch):
            if len(chunk) == batch:
                yield F.pad(rows[chunk].long(), (1, 0), value=BOS)


def loss_of(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Mean next-token loss in nats over `[batch, length]` token ids."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1))


@torch.no_grad()
def perplexity(model: torch.nn.Module, rows: torch.Tensor, batch: int = 16) -> float:
    """Perplexity over `[W, 512]` windows."""
    device = next(model.parameters()).device
    total = sum(loss_of(model, part.to(device)).item() * len(part) for part in rows.split(batch))
    return math.exp(total / len(rows))


def save(model: LlamaForCausalLM, state: dict[str, torch.Tensor], out: Path) -> None:
    """Write `state`, rounded to fp16, as a Hugging Face checkpoint."""
    half = LlamaForCausalLM(model.config)
    half.load_state_dict(state)
    half.generation_config = GenerationConfig(bos_token_id=BOS, eos_token_id=EOS, pad_token_id=EOS)
    half.half().save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)  # written as 0600 otherwise


def optimizer_of(model: torch.nn.Module, lr: float, decay: float) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)


def rate(step: int, steps: int, warmup: int) -> float:
    """Linear warm-up, then a cosine to 2 % of the peak."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def train(args: argparse.Namespace) -> None:
    """Run the schedule, saving the best checkpoint by the loss on `calibration.txt` as it goes."""
    device = torch.device(args.device)
    torch.manual_seed(args.seed)
    model = LlamaForCausalLM(config(args.max_length)).to(device)
    run = model if args.no_compile else torch.compile(model)
    optimizer = optimizer_of(model, args.lr, args.decay)
    stream = torch.from_numpy(np.load(args.corpus / "train.npy").astype(np.int32)).to(device)
    held_out = windows(encode(HERE / "calibration.txt", args.out))
    data = batches(stream, args.length, args.batch, args.seed)
    best, started, mark = math.inf, time.time(), (0, time.time())
    every = max(1, args.steps // args.checks)
    for step in range(args.steps):
        for group in optimizer.param_groups:
            group["lr"] = args.lr * rate(step, args.steps, min(args.warmup, args.steps // 4 + 1))
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss = loss_of(run, next(data))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % every == 0 or step + 1 == args.steps:
            last = loss.item()
            speed = (step + 1 - mark[0]) * args.batch * args.length / (time.time() - mark[1])
            with torch.autocast(device.type, dtype=torch.bfloat16):
                held = math.log(perplexity(model, held_out))
            print(f"step {step + 1} loss {last:.4f} held-out {held:.4f} {speed:.0f} tokens/s", flush=True)
            if held < best:
                best = held
                save(model, {k: v.detach().cpu() for k, v in model.state_dict().items()}, args.out)
            mark = (step + 1, time.time())
    tokens = args.steps * args.batch * args.length
    print(
        f"trained {args.steps} steps, {tokens:,} tokens, {tokens / len(stream):.1f} passes over "
        f"{len(stream):,}, {time.time() - started:.0f} s on {name_of(device)}, torch {torch.__version__}"
    )


def name_of(device: torch.device) -> str:
    """The accelerator, in words."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def evaluate(args: argparse.Namespace) -> None:
    """Print the numbers of the model card for the checkpoint in `args.out`."""
    for dtype in (torch.float32, torch.float16):
        model = AutoModelForCausalLM.from_pretrained(args.out, dtype=dtype).to(args.device).eval()
        for name in ("calibration", "evaluation"):
            rows = windows(encode(HERE / f"{name}.txt", args.out))
            print(
                f"{name}: perplexity {perplexity(model, rows):.3f} (fp16 weights, {dtype} arithmetic; "
                f"{len(rows)} windows, {len(rows) * (WINDOW - 1):,} tokens)"
            )
    ids = encode(HERE / "evaluation.txt", args.out)
    print(f"evaluation: {(HERE / 'evaluation.txt').stat().st_size / len(ids):.2f} bytes a token")
    if (args.corpus / "train.npy").exists():
        counts = np.bincount(np.load(args.corpus / "train.npy"), minlength=VOCAB) + 1.0
        nats = -np.log(counts / counts.sum())[windows(ids)[:, 1:].numpy()].mean()
        print(f"evaluation: unigram perplexity {math.exp(nats):.1f}")
    size = (args.out / "model.safetensors").stat().st_size
    print(f"parameters {model.num_parameters():,}; model.safetensors {size:,} bytes, {size / 2**20:.2f} MiB")


def main() -> None:
    """Parse the command line and run the steps it asks for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--prepare", action="store_true", help="only train the tokenizer and encode the text")
    parser.add_argument("--evaluate", action="store_true", help="only evaluate the model in --out")
    parser.add_argument("--corpus", type=Path, default=HERE.parents[1] / ".corpus", help="scratch folder")
    parser.add_argument("--out", type=Path, default=HERE / "model", help="folder of the model and tokenizer")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=64, help="sequences a step")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a training sequence")
    parser.add_argument("--max-length", type=int, default=2048, help="max_position_embeddings")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--decay", type=float, default=0.2, help="weight decay of matrices")
    parser.add_argument("--warmup", type=int, default=200, help="steps of linear warm-up")
    parser.add_argument("--checks", type=int, default=10, help="how often held-out loss is taken")
    parser.add_argument("--seed", type=int, default=20240607)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-compile", action="store_true", help="do not use torch.compile")
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    if args.prepare:
        return prepare(args.corpus, args.out, args.max_length)
    if not args.evaluate:
        train(args)
    evaluate(args)


if __name__ == "__main__":
    main()
