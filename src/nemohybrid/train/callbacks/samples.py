"""What the model writes, once it is trained."""

from pathlib import Path

from nemohybrid.generate.engine import generate_text
from nemohybrid.generate.sampling import Sampling
from nemohybrid.train.callbacks.base import Callback
from nemohybrid.train.trainer import Trainer


class Samples(Callback):
    """Continues `sample.prompts`, prints the result and keeps it in <run.dir>/samples.txt.

    On every rank, since none may hold the whole model; rank 0 alone prints and writes.
    """

    def on_run_end(self, trainer: Trainer) -> None:
        """All prompts as one batch."""
        options = trainer.config.sample
        sampling = Sampling(options.temperature, options.top_k, options.top_p)
        texts = generate_text(
            trainer.model,
            trainer.data.tokenizer,
            list(options.prompts),
            options.max_new_tokens,
            sampling,
            seed=trainer.config.run.seed,
        )
        trainer.shared.release()
        if not trainer.context.is_main:
            return
        written = "\n".join(f"----- sample {i} -----\n{text}\n" for i, text in enumerate(texts, 1))
        print(f"\n{written}")
        (Path(trainer.config.run.dir) / "samples.txt").write_text(written)
