"""Features of encoded turns, and their on-disk cache.

A frozen encoder gives the same features for the same tokens, so they are computed once and kept under
`{output_dir}/cache/features/`, which runs can share. A file that is damaged, or of another encoder, is not used.
"""

import hashlib
import secrets
import time
from collections.abc import Callable, Sequence, Set
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from geli.nets.encoder import TokenPair, TurnEncoder
from geli.run.distributed import device_name, gather_parts, local_part
from geli.run.errors import first_line
from geli.run.files import atomic_path, private_folder, remove_stale_temporaries

FLUSH_SECONDS = 60  # of encoding that are lost at most when a run is killed


def weights_digest(tensors: dict[str, torch.Tensor], label: str = "") -> str:
    """A hash of a label and of tensors with their names, shapes and types."""
    result = hashlib.blake2b(label.encode(), digest_size=16)
    for name, tensor in sorted(tensors.items()):
        result.update(repr((name, tuple(tensor.shape), str(tensor.dtype))).encode())
        result.update(tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().data)
    return result.hexdigest()


def encoder_fingerprint(encoder: TurnEncoder, numerics: str) -> str:
    """A hash of all that features depend on besides the tokens: weights, architecture, adapter, library versions, and
    `numerics`, the device and type of the forward pass."""
    adapters = getattr(encoder.model, "peft_config", {})
    label = (
        numerics,
        encoder.model.config.to_json_string(),
        type(encoder.model).__name__,
        sorted((name, str(config.to_dict())) for name, config in adapters.items()),
        [version(package) for package in ("torch", "transformers", "peft")],
    )
    return weights_digest(encoder.encoder.state_dict(), repr(label))


def _key(pair: TokenPair) -> bytes:
    """16 bytes that identify a tokenized pair."""
    return hashlib.blake2b(pair.key, digest_size=16).digest()


class FeatureCache:
    """Features of tokenized pairs by one encoder, in `folder`/`fingerprint`.

    Args:
        folder: of all features. fingerprint: of the encoder (`encoder_fingerprint`).
        width: of its features; None accepts any.
    """

    def __init__(self, folder: str | Path, fingerprint: str, width: int | None = None):
        self.folder, self.fingerprint, self.width = Path(folder) / fingerprint, fingerprint, width
        remove_stale_temporaries(self.folder)

    def encode(self, pairs: Sequence[TokenPair], encode: Callable) -> torch.Tensor:
        """(n, hidden) features of n pairs. Each distinct pair is encoded only if no file has it.

        Args:
            encode: (pairs, on_batch) -> features of the missing pairs; it calls on_batch(indices, features) for each
                batch.
        """
        keys = [_key(pair) for pair in pairs]
        distinct, known = dict(zip(keys, pairs, strict=True)), {}
        for path in sorted(self.folder.glob("[!.]*.safetensors")):  # names of unfinished files begin with a dot
            known |= self._read(path, distinct.keys())
        missing = {key: pair for key, pair in distinct.items() if key not in known}
        names, fresh, flushed = list(missing), [], time.monotonic()

        def on_batch(indices, features):
            nonlocal fresh, flushed
            fresh += [(names[i], feature) for i, feature in zip(indices, features, strict=True)]
            if time.monotonic() - flushed > FLUSH_SECONDS:
                self._write(fresh)
                fresh, flushed = [], time.monotonic()

        if missing or not pairs:
            known |= zip(names, encode(list(missing.values()), on_batch=on_batch), strict=True)
            self._write(fresh)
        return torch.stack([known[key] for key in keys]) if keys else torch.empty(0, 0)

    def _write(self, rows: list[tuple[bytes, torch.Tensor]]) -> None:
        """Writes one new file with these features."""
        if not rows:
            return
        keys = np.frombuffer(b"".join(key for key, _ in rows), dtype=np.uint8).reshape(-1, 16)
        tensors = {"keys": torch.from_numpy(keys.copy()), "features": torch.stack([feature for _, feature in rows])}
        private_folder(self.folder)
        with atomic_path(self.folder / f"{secrets.token_hex(8)}.safetensors", every_process=True) as temporary:
            save_file(tensors, temporary, metadata={"checksum": weights_digest(tensors, self.fingerprint)})

    def _read(self, path: Path, wanted: Set[bytes]) -> dict[bytes, torch.Tensor]:
        """The wanted features in a file. If it is damaged or of another encoder, prints that and returns none."""
        try:
            with safe_open(path, "pt") as file:
                checksum = (file.metadata() or {}).get("checksum")
                tensors = {name: file.get_tensor(name) for name in ("keys", "features")}
            keys, features = tensors["keys"], tensors["features"]
            if checksum != weights_digest(tensors, self.fingerprint):
                raise ValueError("damaged, or written for another encoder")
            if keys.shape != (len(features), 16) or features.shape[1:] != (self.width or features.shape[-1],):
                raise ValueError("tensors of unexpected shapes")
            if features.dtype != torch.float32 or not torch.isfinite(features).all():
                raise ValueError("features that are not finite float32 numbers")
        except (OSError, ValueError, LookupError, SafetensorError) as error:
            print(f"Cache: {path} is not used ({first_line(error)})")
            return {}
        content = keys.numpy().tobytes()
        rows = {content[16 * i : 16 * i + 16]: i for i in range(len(features))}
        chosen = {key: i for key, i in rows.items() if key in wanted}
        # indexing copies, so the rest of the file does not stay in memory
        return dict(zip(chosen, features[list(chosen.values())], strict=True))


def encode_together(
    encoder: TurnEncoder, pairs: Sequence[TokenPair], accelerator: Accelerator,
    encode: Callable[[Sequence[TokenPair]], torch.Tensor] | None = None, progress: str | None = None,
) -> torch.Tensor:  # fmt: skip
    """(n, hidden) features of n pairs, of which each process encodes its part: by `encode`, a function of pairs, or by
    `encoder.encode` with a progress bar that says `progress`."""
    mine = local_part(pairs, accelerator)
    features = encode(mine) if encode else encoder.encode(mine, accelerator.autocast, progress=progress)
    if accelerator.num_processes == 1:
        return features
    rows = gather_parts(list(features.numpy()), accelerator)
    return torch.from_numpy(np.stack(rows)) if rows else features


class TurnFeatures:
    """Turns as features: computed once if the encoder is frozen, and at every request if it trains.

    Args:
        cache_dir: folder of the caches; None: no cache. frozen: the encoder does not train.
    """

    def __init__(
        self, encoder: TurnEncoder, accelerator: Accelerator, cache_dir: Path | None = None, frozen: bool = True
    ):
        self.encoder, self.accelerator, self.frozen = encoder, accelerator, frozen
        self._cache: FeatureCache | None = None
        self._held_out = (None, [], None)  # texts, their tokenized pairs, their features
        if cache_dir and frozen:
            numerics = f"{device_name(accelerator.device)} {accelerator.mixed_precision}"
            fingerprint = encoder_fingerprint(encoder, numerics)
            self._cache = FeatureCache(cache_dir / "features", fingerprint, encoder.hidden_size)

    def prepare(self, texts: Sequence[tuple[str, str]], rated_texts: Sequence[tuple[str, str]] | None = None) -> None:
        """Tokenizes the training turns (context, response) and, if the encoder is frozen, encodes them. `rated_texts`:
        the same turns with the user's answer to the survey appended, if training shows it."""
        self._pairs = [self.encoder.tokenize(part) for part in (texts, rated_texts) if part is not None]
        if self.frozen:
            self._features = [self._encode(pairs, "training") for pairs in self._pairs]
        else:
            self.encoder.remember([pair for pairs in self._pairs for pair in pairs], self.accelerator.autocast)

    def training(self, turns: np.ndarray, rated: np.ndarray, calls: int) -> torch.Tensor:
        """(k, hidden) features of training turns, on the CPU.

        Args:
            turns: (k,) indices. rated: (k,) bool: with the user's answer shown.
            calls: number of such calls whose activations are kept at the same time, if the encoder trains.
        """
        if not self.frozen:
            pairs = [self._pairs[shown][i] for i, shown in zip(turns, rated.astype(int), strict=True)]
            return self.encoder.encode_with_gradients(pairs, self.accelerator.autocast, calls).cpu()
        plain = self._features[0][turns]
        if not rated.any():
            return plain
        return torch.where(torch.from_numpy(rated)[:, None], self._features[1][turns], plain)

    def idle_passes(self, n: int) -> torch.Tensor:
        """() 0, after `n` calls of `training` for no turns, which a process makes that has fewer trajectories than the
        others: all processes must make the same number of passes through sharded layers."""
        none = np.arange(0)
        return torch.stack([torch.zeros(()), *(self.training(none, none, 1).sum() for _ in range(n))]).sum()

    def held_out(self, texts: Sequence[tuple[str, str]]) -> torch.Tensor:
        """(N, hidden) features of held-out turns (context, response). The texts that were given last are not tokenized
        again, nor encoded again while the encoder is frozen."""
        known, pairs, features = self._held_out
        if texts != known:
            pairs, features = self.encoder.tokenize(texts), None
        if features is None or not self.frozen:
            features = self._encode(pairs, "validation")
        self._held_out = texts, pairs, features
        return features

    def _encode(self, pairs: Sequence[TokenPair], label: str) -> torch.Tensor:
        encode = partial(self.encoder.encode, autocast=self.accelerator.autocast, progress=f"encoding {label}")
        if self._cache:
            encode = partial(self._cache.encode, encode=encode)
        return encode_together(self.encoder, pairs, self.accelerator, encode)
