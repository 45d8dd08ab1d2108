"""A callback that raises an alert, whatever happens."""

from __future__ import annotations

import lightning as L
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from lightning_pref.alerts import Alert
from lightning_pref.callbacks.hosts import LightningHost


class Outspoken(Callback):
    """Raises one alert when training ends."""

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        alert = Alert(
            name="outspoken/says", level="warning", since_step=1, step=2, source="train", evidence="All of it.", advice="None."
        )
        LightningHost(trainer, pl_module).say(alert)
