"""Settings of `experiments.train_moe`."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from configs.options import Names, Setting, Settings, fixed, option, parts
from specmd_jax.errors import SpecmdError
from specmd_jax.training import ATTENTIONS, BALANCES, OPTIMIZERS, SCHEDULES, Training

SMOKE = Training(
    layers=2, width=32, heads=2, kv_heads=1, head_dim=16, experts=4, top_k=2, expert_width=16, sequence=32, batch=4,
    block_rows=16, steps=12, dispatch=4, warmup_steps=4, evaluations=2, evaluation_windows=8, compute="float32",
)  # fmt: skip


@dataclass(frozen=True)
class TrainMoEConfig(Settings):
    """One training run. What decides the weights is in `training` and the data."""

    data: str | None = option(
        None,
        "the folder of tokens to train on",
        metavar="FOLDER",
        shown="none; --smoke reads this package's source",
    )
    corpus: str | None = option(
        None, "make the folder --data of the texts in this one (DOMAIN.txt or DOMAIN.txt.xz), and train nothing",
        metavar="FOLDER", shown="none",
    )  # fmt: skip
    vocabulary: int = option(8192, "tokens of the tokenizer that --corpus trains", least=257, below=65537)
    time_limit: float | None = option(
        None, "seconds until this process stops and saves; the same command goes on", metavar="S", above=0, shown="none"
    )
    run_time: float | None = option(
        None, "seconds of the whole run, which its number of steps is chosen by as it begins", metavar="S", above=0,
        shown="as --time-limit",
    )  # fmt: skip
    training: Training = field(
        default=Training(),
        metadata=parts(
            {
                "dense": Setting("one expert as wide as those that a token uses: a dense twin"),
                "layers": Setting("layers", least=1),
                "width": Setting("model width", least=1),
                "experts": Setting("experts of a layer", least=1),
                "top_k": Setting("experts that a token uses", least=1),
                "expert_width": Setting("width of an expert", least=1),
                "sequence": Setting("tokens of a sequence", least=1),
                "batch": Setting("sequences of an update", least=1),
                "epochs": Setting("most times that as many tokens as there are to train on are read", above=0),
                "steps": Setting("updates, in whole dispatches; 0: what --epochs and the time allow", least=0),
                "learning_rate": Setting("highest learning rate", above=0, below=1),
                "weight_decay": Setting("weight decay, times the learning rate", least=0),
                "dropout": Setting("share left out of what the embedding and each half layer give", least=0, below=1),
                "optimizer": Setting("optimizer of the matrices", names=Names("optimizer", also=OPTIMIZERS)),
                "schedule": Setting("course of the learning rate", names=Names("schedule", also=SCHEDULES)),
                "balance": Setting("what keeps all experts in use", names=Names("balance", also=BALANCES)),
                "attention": Setting("kernel of the attention", names=Names("attention", also=ATTENTIONS)),
                "seed": Setting("seed of first weights, order and dropout", least=0),
            }
        ),
    )
    final_windows: int = fixed(0, "most sequences of a domain in the last evaluation; 0: all", least=0)

    def smoke(self) -> TrainMoEConfig:
        """Gives a run of seconds."""
        return replace(self, training=SMOKE, vocabulary=320, final_windows=8)

    def check(self) -> None:
        """Raises `SpecmdError` for texts that are to go nowhere."""
        if self.corpus is not None and self.data is None:
            raise SpecmdError("--corpus FOLDER is given without --data FOLDER, where its tokens go")
