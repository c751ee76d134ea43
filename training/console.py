"""What a run tells while it goes and when it ends, on standard error."""

import math
import sys
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from .run_folder import best


def say(text: str) -> None:
    """A line that does not break a progress bar."""
    tqdm.write(text, file=sys.stderr)


def epoch_line(row: dict[str, Any], epochs: int) -> str:
    """One line on a finished epoch, from its row of metrics."""
    validation = ""
    if row["val_top1"] is not None:
        ema = f" (EMA {100 * row['ema_top1']:.2f}%)" if "ema_top1" in row else ""
        validation = f"validation loss {row['val_loss']:.4f}, top-1 {100 * row['val_top1']:.2f}%{ema}, "
    return (
        f"epoch {row['epoch']}/{epochs}: training loss {row['train_loss']:.4f}, {validation}"
        f"{row['images_per_second']:.0f} images/s, {row['seconds']:.0f} s"
    )


def summary(folder: Path, results: dict[str, Any], ours: bool) -> str:
    """What came out of a finished run, and what to do with it; only one of `ours` can be released."""
    score = best(results)
    low, high = score["top1_interval"]
    lines = [
        "",
        f"top-1 {100 * score['top1']:.2f}% (95% interval {100 * low:.2f} to {100 * high:.2f}) "
        f"on {score['images']} images, {results['train_seconds']:.0f} s of training, "
        f"{results['train_images_per_second']:.0f} images/s, {results['peak_memory_bytes'] / 2**20:.0f} MiB at most",
    ]
    if "better" in results:
        other = "raw" if results["better"] == "ema" else "ema"
        lines.append(f"better weights: {results['better']} (the others are model_{other}.safetensors)")
    lines += [
        f"curves    {folder / 'curves.png'}",
        f"load      timm.create_model('local-dir:{folder}', pretrained=True)  # after import timm, risotto_zoo",
        f"evaluate  python -m training.evaluate local-dir:{folder}",
    ]
    if ours:
        lines.append(f"release   python -m training.release {folder} --tag DATA --output FOLDER")
    return "\n".join(lines)


class EpochBar:
    """A progress bar on a terminal, a line every `log_every` steps elsewhere, nothing where not `shown`."""

    def __init__(self, epoch: int, epochs: int, steps: int, step: int, log_every: int, shown: bool) -> None:
        self.terminal = sys.stderr.isatty()
        self.every = 10 if self.terminal else log_every
        self.step, self.total, self.shown = step, epochs * steps, shown
        self.bar = tqdm(
            total=steps,
            initial=step - epoch * steps,
            desc=f"epoch {epoch + 1}/{epochs}",
            unit="step",
            leave=False,
            disable=not (shown and self.terminal),
            dynamic_ncols=True,
        )

    def __enter__(self) -> "EpochBar":
        return self

    def __exit__(self, *_exception: object) -> None:
        self.bar.close()

    def advance(self, sums: Tensor, rate: float, batch_size: int) -> None:
        """One step further; `sums` are this epoch's images, loss and correct answers, `rate` is in images/s."""
        self.bar.update()
        self.step += 1
        if not self.shown or self.step % self.every:
            return
        images, loss, correct = sums.tolist()
        left = _clock((self.total - self.step) * batch_size / rate) if rate else "?"
        text = f"loss {loss / images:.4f}, top-1 {100 * correct / images:.1f}%, {rate:.0f} images/s, {left} left"
        if self.terminal:
            self.bar.set_postfix_str(text, refresh=False)
        else:
            say(f"step {self.step}/{self.total}: {text}")


def _clock(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "?"
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
