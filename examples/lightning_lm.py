"""A LongNet language model trained with Lightning: `python examples/lightning_lm.py`.

Needs: pip install '.[examples]'
"""

from __future__ import annotations

import argparse

import pytorch_lightning as lightning
import torch
import torch.nn.functional as F
from text import VOCABULARY, Excerpts, standard_library
from torch import Tensor

from dilated_attention_pytorch import LongNetConfig, LongNetLM


class LanguageModel(lightning.LightningModule):
    """`LongNetLM` with its loss and optimizer."""

    def __init__(self, config: LongNetConfig, learning_rate: float = 3e-3) -> None:
        super().__init__()
        self.model, self.learning_rate = LongNetLM(config), learning_rate

    def training_step(self, batch: tuple[Tensor, Tensor], step: int) -> Tensor:
        tokens, following = batch
        loss = F.cross_entropy(self.model(tokens).flatten(0, 1), following.flatten())
        if step % 10 == 0 or step == self.trainer.max_steps - 1:
            self.print(f"step {step} loss {loss.item():.3f}")
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.learning_rate)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--accelerator", default="auto")
    options = parser.parse_args()
    lightning.seed_everything(0, verbose=False)

    config = LongNetConfig(
        vocab_size=VOCABULARY, d_model=64, nhead=4, num_decoder_layers=2, dim_feedforward=256,
        segment_lengths=[options.context // 8, options.context // 2, options.context], dilation_rates=[1, 2, 4],
    )  # fmt: skip
    excerpts = Excerpts(standard_library(), options.context, 2 * options.steps)
    trainer = lightning.Trainer(
        accelerator=options.accelerator, devices=1, max_steps=options.steps, gradient_clip_val=1.0,
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(LanguageModel(config), torch.utils.data.DataLoader(excerpts, batch_size=2))


if __name__ == "__main__":
    main()
