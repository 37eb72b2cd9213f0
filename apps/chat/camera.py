"""A person's camera: one picture a second becomes the probabilities of a face, in memory."""

from collections.abc import AsyncIterator
from weakref import WeakKeyDictionary

import numpy as np

from apps.chat.sessions import Session
from apps.faces import FACE_MODELS
from geli.run.errors import UserError

LARGEST = 640  # pixels of a side, as page.js has it


class Camera:
    """Reads the faces of people who talk. Each session has a reader of its own, which follows that person's face.

    Args:
        face_model: a key of `FACE_MODELS`.

    Raises:
        UserError: if a package or file of the model is missing.
    """

    def __init__(self, face_model: str):
        self.name, self.load = face_model, FACE_MODELS[face_model].load
        self.load()  # says at once what is missing
        self._readers = WeakKeyDictionary()

    async def receive(self, body: AsyncIterator[bytes], width: int) -> np.ndarray:
        """A picture's pixels (H, width, 3) uint8, from the RGBA bytes that the page sends.

        Raises:
            UserError: if they are no picture of at most 640 x 640 pixels.
        """
        content = bytearray()
        async for part in body:
            content += part
            if len(content) > 4 * LARGEST * LARGEST:
                break
        if not 0 < width <= LARGEST or not content or len(content) % (4 * width) or len(content) > 4 * LARGEST * width:
            raise UserError(f"expected a picture of at most {LARGEST} x {LARGEST} pixels")
        return np.frombuffer(bytes(content), np.uint8).reshape(-1, width, 4)[:, :, :3]

    def look(self, session: Session, pixels: np.ndarray) -> None:
        """Tells a session what its person's face looks like."""
        with session.lock:
            reader = self._readers.get(session) or self._readers.setdefault(session, self.load())
            found = reader(pixels)
            session.see(None if found is None else found.tolist(), self.name)
