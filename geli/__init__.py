"""Turn-level rewards from conversation-level scores: what the three training commands are built from.

`from geli import GELIReward` is a trained reward as a function that other trainers call.
"""


def __getattr__(name: str):
    """Loads `GELIReward` when it is asked for, because it imports torch and transformers."""
    if name == "GELIReward":
        from geli.reward import GELIReward

        return GELIReward
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
