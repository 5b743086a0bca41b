"""RunSpec: what a person asks for. One schema for the form, the YAML of presets/, the command line and validation.

Each field carries its label, unit, help and remedy in an `About`, so that the form, `--help` and error messages
say the same words.
"""

from dataclasses import dataclass
from typing import Annotated, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field

Group = Literal["model", "data", "method", "optimizer", "memory", "training", "evaluation", "run"]
Method = Literal["sift", "random", "magnitude", "fisher", "spiel-ag", "spiel-ma", "lora", "ia3", "full"]
METHODS: dict[Method, str] = {
    "sift": "trains the entries with the largest first gradients. Start here.",
    "random": "trains as many entries drawn at random: the papers' control.",
    "magnitude": "trains the entries of largest or smallest |weight|; needs no data to choose.",
    "fisher": "trains the entries with the largest sums of squared gradients.",
    "spiel-ag": "drops and grows entries while training, by their mean gradients.",
    "spiel-ma": "drops and grows entries by SM3's accumulators: the least memory.",
    "lora": "small low-rank matrices beside the linear layers, to compare with.",
    "ia3": "a learned scale for keys, values and the MLP, to compare with.",
    "full": "trains every entry of the targets, to compare with.",
}
SPIEL_METHODS: tuple[Method, ...] = ("spiel-ag", "spiel-ma")
SELECTING: tuple[Method, ...] = ("sift", "fisher")  # choose their entries from first gradients
SPARSE: tuple[Method, ...] = ("sift", "random", "magnitude", "fisher", "spiel-ag", "spiel-ma")
BASELINES: tuple[Method, ...] = ("lora", "ia3", "full")  # not sparse: what a person compares with
OptimizerName = Literal[
    "adamw",
    "sm3",
    "sgd",
    "adam",
    "nadam",
    "radam",
    "adagrad",
    "adadelta",
    "adamax",
    "rmsprop",
    "rprop",
    "asgd",
]
Structure = Literal["free", "columns", "rows_x_columns"]
Role = Literal["instruction", "input", "output", "system", "messages", "text", "text_pair", "label"]

SHORTEST_LENGTH = 8  # tokens
_DENSITY = "Trained share of the entries of each target weight, for the sparse methods; lora, ia3 and full have none."


@dataclass(frozen=True)
class About:
    """What a person is told of a field.

    `rule` completes "must be ..." where the type does not say it well; `methods` are those that read the field, where
    not all do; `detail`: few change it, so a form shows it folded.
    """

    group: Group
    label: str
    help: str
    unit: str = ""
    rule: str = ""
    remedy: str = ""
    methods: tuple[str, ...] = ()
    detail: bool = False


class RunSpec(BaseModel):
    """Everything that decides a run; the same spec on the same machine gives the same bits.

    Frozen; unknown keys are refused. Build one with `spec_io.parse_spec`, which reports every problem at once.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())

    model: Annotated[
        str,
        Field(min_length=1),
        About("model", "Base model", "Bundled name, local folder or Hugging Face Hub id.", remedy="Try `demo`."),
    ]
    model_revision: Annotated[
        str | None, About("model", "Model revision", "Branch, tag or commit on the Hub. Empty: the default branch.")
    ] = None
    quantization: Annotated[
        Literal["none", "nf4"],
        About(
            "model",
            "Base weights",
            "How the frozen base is stored. none: in the data type below; nf4: linear layers in 4 bit, dequantised "
            "where they are used.",
        ),
    ] = "none"
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        About(
            "model",
            "Data type",
            "Of the base weights. auto: bfloat16 on a GPU, float32 on the CPU. The trained values are always float32.",
        ),
    ] = "auto"

    task: Annotated[
        Literal["causal", "classification"],
        About(
            "data",
            "Task",
            "causal: the model goes on with a text; classification: it gives a text, or a pair of texts, one of the "
            "dataset's labels, or a number where the labels are numbers with a fraction.",
        ),
    ] = "causal"
    dataset: Annotated[
        str | None,
        About(
            "data",
            "Dataset",
            "Bundled name, local file or folder (JSON, JSONL, CSV, Parquet, text) or Hugging Face Hub id.",
        ),
    ] = None
    dataset_config: Annotated[
        str | None,
        About("data", "Configuration", "Part of a Hub dataset that has several, such as mrpc of nyu-mll/glue."),
    ] = None
    dataset_split: Annotated[
        str, About("data", "Split", "Part of the dataset to train on. A part named test or validation is held out.")
    ] = "train"
    dataset_format: Annotated[
        Literal["auto", "instruction", "messages", "text", "classification"],
        About(
            "data",
            "Row format",
            "instruction: question and answer columns; messages: chats; text: plain text; classification: one or two "
            "texts and a label, for that task only.",
        ),
    ] = "auto"
    columns: Annotated[
        dict[Role, str],
        About(
            "data",
            "Columns",
            "Which column plays which role, where the names are not recognised: "
            "instruction, input, output, system, messages, text; text, text_pair, label for classification.",
            rule="a mapping of instruction, input, output, system, messages, text, text_pair or label to a column",
            remedy="For example {instruction: question, output: answer}.",
        ),
    ] = {}
    template: Annotated[
        Literal["auto", "tokenizer", "plain"],
        About(
            "data", "Chat template", "auto: the tokenizer's own if it has one, else plain (User: ... Assistant: ...)."
        ),
    ] = "auto"
    evaluation_fraction: Annotated[
        float,
        Field(ge=0, lt=1),
        About(
            "data",
            "Held-out share",
            "Share of the rows kept for evaluation where the dataset has no test or validation part.",
            remedy="For 5 percent write 0.05.",
        ),
    ] = 0.05

    method: Annotated[
        Method,
        About(
            "method",
            "Method",
            " ".join(f"{name}: {words}" for name, words in METHODS.items()),
        ),
    ] = "sift"
    density: Annotated[float, Field(gt=0, le=1), About("method", "Density", _DENSITY)] = 0.01
    num_trainable: Annotated[
        int | None,
        Field(ge=1),
        About(
            "method",
            "Trained entries",
            "Instead of density: entries over all targets together; sparse methods only.",
            "entries",
        ),
    ] = None
    targets: Annotated[
        Literal["attention", "linear", "all"] | tuple[str, ...],
        About(
            "method",
            "Trained weights",
            "attention: q, k, v, o; linear: all linear layers of the blocks; all: every parameter; or a list of "
            "patterns, each a part of a parameter's name (q_proj) or a glob (model.layers.1?.*). lora and ia3 take the "
            "linear layers of the blocks among them; of a word, ia3 takes keys, values and the MLP's last layer.",
            rule="attention, linear, all or a list of patterns",
        ),
    ] = "linear"
    selection_micro_steps: Annotated[
        int | None,
        Field(ge=1),
        About(
            "method",
            "Selection batches",
            "Of sift and fisher: micro-batches whose gradient chooses the entries. Empty: those of the first optimizer "
            "step.",
            "micro-batches",
            methods=SELECTING,
            detail=True,
        ),
    ] = None
    selection_memory_gib: Annotated[
        float | None,
        Field(gt=0),
        About(
            "method",
            "Selection memory",
            "Most main memory for summing the gradients of several micro-batches that choose entries. Where they need "
            "more, the weights are done in groups, one pass over the micro-batches each, with the same result. Empty: "
            "half of this computer's.",
            "GiB",
            methods=("sift", "fisher", "spiel-ag"),
            detail=True,
        ),
    ] = None
    reselection_period: Annotated[
        int | None,
        Field(ge=2),
        About(
            "method",
            "Choose anew every",
            "Of sift and fisher: steps after which the entries are chosen anew; those that leave keep their change, so "
            "the result grows. Empty: chosen once, as the paper does.",
            "steps",
            methods=SELECTING,
            detail=True,
        ),
    ] = None
    allocation: Annotated[
        Literal["uniform", "global"],
        About(
            "method",
            "Budget",
            "uniform: the same density in every weight, as both papers have it; global: the largest scores over all "
            "weights together, so that the entries go to where the gradient is.",
            methods=("sift", "fisher", "magnitude", "spiel-ag"),
            detail=True,
        ),
    ] = "uniform"
    structure: Annotated[
        Structure,
        About(
            "method",
            "Structure",
            "Which entries may be chosen together. free: any; columns: whole input columns of a weight; "
            "rows_x_columns: rows times columns. As many entries; their gradient costs next to nothing.",
            methods=("sift", "random", "magnitude", "fisher"),
            detail=True,
        ),
    ] = "free"
    magnitude: Annotated[
        Literal["largest", "smallest"],
        About(
            "method",
            "By magnitude",
            "Of magnitude: train the entries of largest or smallest |weight|.",
            methods=("magnitude",),
        ),
    ] = "largest"
    period: Annotated[
        int,
        Field(ge=1),
        About(
            "method", "Period", "Of SpIEL: steps between reselections (the paper's S).", "steps", methods=SPIEL_METHODS
        ),
    ] = 20
    estimation_steps: Annotated[
        int,
        Field(ge=1),
        About(
            "method",
            "Estimation steps",
            "Of SpIEL: steps before a reselection in which the gradient is averaged (the paper's gamma).",
            "steps",
            methods=SPIEL_METHODS,
        ),
    ] = 5
    initial_rate: Annotated[
        float,
        Field(ge=0, le=1),
        About(
            "method",
            "Initial rate",
            "Of SpIEL: share of the entries replaced at first (the paper's xi).",
            methods=SPIEL_METHODS,
        ),
    ] = 0.2
    schedule: Annotated[
        Literal["linear", "cosine"],
        About(
            "method",
            "Replacement schedule",
            "Of SpIEL: how the replaced share falls to zero.",
            methods=SPIEL_METHODS,
        ),
    ] = "linear"

    lora_rank: Annotated[
        int,
        Field(ge=1, le=4096),
        About("method", "LoRA rank", "Of lora: width of the two matrices beside each layer.", methods=("lora",)),
    ] = 16
    lora_alpha: Annotated[
        int,
        Field(ge=1, le=65536),
        About("method", "LoRA alpha", "Of lora: their product is scaled by alpha / rank.", methods=("lora",)),
    ] = 32

    optimizer: Annotated[
        Literal["auto", OptimizerName],
        About(
            "optimizer",
            "Optimizer",
            "Over the trained values. auto: sm3 for spiel-ma, else adamw. spiel-ag takes adamw only, spiel-ma sm3 "
            "only; the other methods take any, those of torch with torch's own settings.",
            rule=f"one of auto, {', '.join(get_args(OptimizerName))}, which work entry by entry",
            remedy="Not those that need matrices (muon), a closure (lbfgs) or the size of the weights (adafactor).",
        ),
    ] = "auto"
    optimizer_states: Annotated[
        Literal["float32", "8bit", "compact"],
        About(
            "optimizer",
            "Optimizer states",
            "Of adamw. 8bit: its moments as blockwise codes of bitsandbytes, a quarter of the memory; tensors with "
            "fewer than 4,096 trained entries stay in float32. compact: 8bit, and the entries themselves in little "
            "memory, 12 bytes each with gradient and states, 14 where entries move; over bfloat16 the base holds half "
            "of each value. The trained values are always float32.",
        ),
    ] = "float32"
    offload_states: Annotated[
        bool,
        About(
            "optimizer",
            "States in main memory",
            "Of adamw: keep its states in main memory and bring those of one weight at a time to the GPU. The numbers "
            "are the same; on the CPU nothing changes.",
            rule="true or false",
        ),
    ] = False
    learning_rate: Annotated[
        float, Field(gt=0, le=10), About("optimizer", "Learning rate", "Peak learning rate.", remedy="Try 0.0002.")
    ] = 2e-4
    lr_schedule: Annotated[
        Literal["linear", "cosine", "constant"],
        About("optimizer", "Schedule", "How the learning rate falls after the warm-up."),
    ] = "linear"
    warmup_fraction: Annotated[
        float,
        Field(ge=0, lt=1),
        About("optimizer", "Warm-up", "Share of the steps in which the learning rate rises.", remedy="Try 0.03."),
    ] = 0.03
    weight_decay: Annotated[
        float,
        Field(ge=0, le=1000),
        About(
            "optimizer",
            "Weight decay",
            "Pulls the change from the base towards zero; of full and ia3, the trained numbers themselves.",
        ),
    ] = 0.0
    max_grad_norm: Annotated[
        float | None,
        Field(gt=0),
        About("optimizer", "Gradient clipping", "Largest norm of the values' gradient. Empty: no clipping."),
    ] = 1.0

    sequence_length: Annotated[
        int,
        Field(ge=SHORTEST_LENGTH, le=1_048_576),
        About("memory", "Sequence length", "Longest row; longer ones are cut.", "tokens"),
    ] = 512
    micro_batch_size: Annotated[
        int, Field(ge=1, le=4096), About("memory", "Micro-batch", "Rows in one backward.", "sequences")
    ] = 1
    gradient_accumulation: Annotated[
        int, Field(ge=1, le=65536), About("memory", "Accumulation", "Backwards in one optimizer step.", "micro-batches")
    ] = 16
    gradient_checkpointing: Annotated[
        bool,
        About(
            "memory",
            "Checkpointing",
            "Recompute activations in the backward: less memory, slower.",
            rule="true or false",
        ),
    ] = False
    recompute: Annotated[
        Literal["nothing", "elementwise", "mlp", "blocks", "auto"],
        About(
            "memory",
            "Recompute",
            "What the backward makes again instead of finding it kept. nothing: only what the model's own code "
            "recomputes; elementwise: norm outputs and activation products, at next to no cost; mlp: also gate and up "
            "of the first blocks; blocks: the first blocks as a whole, as checkpointing does with all; auto: as "
            "little as fits the budget. elementwise and mlp are for the sparse methods, on Llama, Mistral, Qwen 2 and "
            "3, Gemma and Phi.",
        ),
    ] = "nothing"
    recompute_blocks: Annotated[
        int | None,
        Field(ge=1),
        About(
            "memory",
            "Recomputed blocks",
            "Of mlp and blocks: how many of the first. Empty: all.",
            "blocks",
            detail=True,
        ),
    ] = None
    offload_activations: Annotated[
        bool,
        About(
            "memory",
            "Inputs in main memory",
            "Of blocks that checkpointing or recompute make anew as a whole: keep what enters them in "
            "main memory and bring it back for their backward. The last resort: steps wait for it. The numbers are the "
            "same; on the CPU nothing changes.",
            rule="true or false",
            detail=True,
        ),
    ] = False
    chunked_loss: Annotated[
        bool,
        About(
            "memory",
            "Loss in chunks",
            "Compute output layer and loss for a few tokens at a time: less memory, the same loss. Where a model's "
            "output layer is not known, it is computed in one piece.",
            rule="true or false",
        ),
    ] = False
    gradient_way: Annotated[
        Literal["auto", "dense", "compaction", "sampled"],
        About(
            "memory",
            "Way to the gradient",
            "How the gradient of the trained entries of a linear layer is computed; all ways are exact. dense: the "
            "whole gradient of the weight; compaction: a few small products that hold most entries, and a dot product "
            "for each of the others; sampled: a dot product an entry; auto: for each weight what is fastest on this "
            "machine.",
            methods=SPARSE,
            detail=True,
        ),
    ] = "auto"
    attention: Annotated[
        Literal["sdpa", "eager"],
        About(
            "memory",
            "Attention",
            "sdpa: fused kernels, where transformers has them for the model's family; eager: plain matrix products.",
        ),
    ] = "sdpa"
    num_processes: Annotated[
        int,
        Field(ge=1, le=64),
        About(
            "memory",
            "Processes",
            "Cards that share each step, a process each, started by torchrun: with n of them a step has n times "
            "as many micro-batches, and only the gradients of the trained entries are exchanged. On the "
            "CPU, processes on its cores.",
            "processes",
            detail=True,
        ),
    ] = 1
    device: Annotated[
        str,
        Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$"),
        About(
            "memory", "Device", "auto: the first GPU if there is one, else the CPU.", rule="auto, cpu, cuda or cuda:N"
        ),
    ] = "auto"
    budget_gib: Annotated[
        float | None,
        Field(gt=0, le=1_000_000),
        About("memory", "Memory budget", "Most memory the run may use. Empty: all the device has.", "GiB"),
    ] = None

    epochs: Annotated[
        float, Field(gt=0, le=10_000), About("training", "Epochs", "Times each row is seen.", "epochs")
    ] = 1.0
    max_steps: Annotated[
        int | None, Field(ge=1), About("training", "Steps", "Instead of epochs: optimizer steps.", "steps")
    ] = None
    seed: Annotated[int, Field(ge=0, lt=2**32), About("training", "Seed", "Decides data order and random choices.")] = 0

    preflight: Annotated[
        bool,
        About(
            "training",
            "Try first",
            "Before the run, one step at the longest batch, and on a GPU an evaluation batch and a checkpoint: what "
            "will run out of memory does so in the first minute. The run is the same with and without.",
            rule="true or false",
        ),
    ] = True

    evaluation_interval: Annotated[
        int, Field(ge=0), About("evaluation", "Evaluate every", "0: only before and after.", "steps")
    ] = 50
    evaluation_rows: Annotated[
        int, Field(ge=1), About("evaluation", "Held-out rows", "Most rows the held-out loss is computed on.", "rows")
    ] = 200
    exact_match_rows: Annotated[
        int,
        Field(ge=0),
        About(
            "evaluation",
            "Answered rows",
            "Held-out questions answered before and after the run and compared word for word; causal only. 0: none.",
            "rows",
        ),
    ] = 0
    probe_interval: Annotated[
        int,
        Field(ge=0),
        About(
            "evaluation",
            "Probe every",
            "How often the sparsity of the gradient is measured; sparse methods only. 0: never.",
            "steps",
        ),
    ] = 25
    logging_interval: Annotated[
        int,
        Field(ge=1),
        About(
            "run",
            "Read figures every",
            "Steps whose loss and gradient norm are read off the device together, so that it does not wait between "
            "them. Each step is reported all the same. A number that is not finite is found when they are read; "
            "float16 looks at every gradient anyway.",
            "steps",
            detail=True,
        ),
    ] = 1
    checkpoint_interval: Annotated[
        int, Field(ge=0), About("run", "Checkpoint every", "0: only when the run stops or ends.", "steps")
    ] = 200
    output: Annotated[str, Field(min_length=1), About("run", "Runs folder", "Where the run's folder is made.")] = "runs"


def about(name: str) -> About:
    """Return what a person is told of the field `name`.

    Raises:
        KeyError: there is no such field.
    """
    return next(item for item in RunSpec.model_fields[name].metadata if isinstance(item, About))


def choices(name: str) -> tuple[str, ...]:
    """Return the words a field accepts, in order; empty for a field that is not a choice."""
    annotation = RunSpec.model_fields[name].annotation
    options = [annotation] if get_origin(annotation) is dict else [annotation, *get_args(annotation)]
    return next((get_args(option) for option in options if get_origin(option) is Literal), ())
