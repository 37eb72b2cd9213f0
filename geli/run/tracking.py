"""wandb runs: how they are started, what is sent, and what never is."""

import os
import platform
import secrets
from argparse import ArgumentTypeError
from importlib import metadata
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from geli.run.console import is_main_process
from geli.run.errors import first_line
from geli.run.files import private_folder
from geli.run.lock import RunLock, lock_new_run
from geli.run.options import RunOptions, file_name
from geli.run.run_names import new_run_name

PACKAGES = "torch transformers tokenizers peft accelerate safetensors numpy pandas scikit-learn wandb"


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result may depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES.split():
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


class Tracker:
    """A wandb run: online if the user is logged in or `WANDB_MODE=online`, else offline. It never asks for a login and
    sends no console output, source code, host or user name. With `WANDB_MODE=disabled` there is none, and wandb need
    not be installed.

    Args:
        project: wandb's project.
        folder: where the run's outputs go; `wandb/` is created beside it.
        arguments: name -> value of the run's options; none of the values may hold a conversation's text or id.
        run: of which `run_name` (None: wandb's own, or one like it) and `log_text` are used.
        accelerator: of several processes the main one logs, and all know the name.
        lock: on the run's name, if it is held already, as by a resumed run; None: taken here.

    Attributes:
        name: the run's name.
        lock: the `RunLock` on it, in the main process; None in the others.
        offset: added to every step that is logged, because wandb's steps can only increase.
        logged: {"rows": [{"step": step, name: value}]}, the numbers that were logged; a checkpoint can hold it.
    """

    def __init__(
        self, project: str, folder: Path, arguments: dict, run: RunOptions, accelerator: Accelerator,
        lock: RunLock | None = None,
    ):  # fmt: skip
        self._run, self.name, self.lock, self.offset = None, "", lock, 0
        self.logged: dict[str, list[dict]] = {"rows": []}
        if is_main_process():
            self._start(project, folder, {**arguments, "processes": accelerator.num_processes}, run)
        self.name = broadcast_object_list([self.name])[0]
        if is_main_process():
            print(f"Run {self.name}, in {folder}", flush=True)

    def _start(self, project: str, folder: Path, arguments: dict, run: RunOptions) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        logs = folder.parent / "wandb"
        if run.log_text or not logs.exists():  # with --log_text it may hold conversations
            private_folder(logs)
        resumed = self.lock.description.get("wandb") if self.lock else None
        mode = os.environ.get("WANDB_MODE") or "online"
        mode = "offline" if mode == "online" and not _logged_in() else mode  # online, wandb would ask for a key
        name = resumed["name"] if resumed else self._choose_name(folder, run.run_name, mode)
        if mode != "disabled":
            self._run = _init(project, folder, arguments, name, mode, resumed and resumed["id"])
        try:
            self.name = name or file_name(self._run.name or "")
        except ArgumentTypeError:  # WANDB_NAME or the server gave a name that cannot be part of a file name
            self.name = new_run_name(folder)
        if not self.lock:
            self.lock = lock_new_run(folder, self.name, or_another=True)  # wandb does not know which runs are here
            self.name = self._run.name = self.lock.name
        if not resumed:
            wandb_run = {"id": self._run.id if self._run else secrets.token_hex(4), "name": self.name}
            self.lock.describe({"arguments": arguments, "wandb": wandb_run, "versions": versions()})

    def _choose_name(self, folder: Path, run_name: str | None, mode: str) -> str | None:
        """The name of a new run, with a lock on it; None where wandb's server is to choose."""
        if not self.lock and (run_name or mode != "online"):
            self.lock = lock_new_run(folder, run_name)
            return self.lock.name
        return run_name or (new_run_name(folder) if mode != "online" else None)

    def log(self, values: dict, step: int) -> None:
        """Logs numbers at `step`."""
        self.logged["rows"].append({"step": step, **values})
        if self._run:
            self._run.log(values, step=self.offset + step)

    def log_table(self, key: str, table, step: int) -> None:
        """Logs a pandas table that may hold text. Callers must check `--log_text` first."""
        if self._run:
            import wandb

            self._run.log({key: wandb.Table(dataframe=table)}, step=self.offset + step)

    def log_bars(self, key: str, heights: dict[int, float]) -> None:
        """Logs a bar chart of rewards by turn number."""
        if not self._run:
            return
        import wandb

        table = wandb.Table(columns=["turn", "predicted reward"], data=[[str(n), r] for n, r in heights.items()])
        self._run.log({key: wandb.plot.bar(table, "turn", "predicted reward", title="predicted reward by turn")})

    def log_pictures(self, pictures: dict[str, Path]) -> None:
        """Logs PNG files that hold no text of conversations."""
        if self._run:
            import wandb

            self._run.log({key: wandb.Image(str(path)) for key, path in pictures.items()})

    @property
    def wandb_run(self) -> dict[str, str]:
        """Project and id of the wandb run, by which others find it."""
        return {"project": self._run.project, "id": self._run.id} if self._run else {}

    def summary(self, values: dict) -> None:
        """Sets the run's summary values."""
        if self._run:
            self._run.summary.update(values)

    def finish(self) -> None:
        """Closes the run, after all its files were written, and removes its checkpoints and its lock."""
        if self._run:
            self._run.finish()
            if self._run.settings.mode == "offline":
                folder = Path(self._run.dir).parent
                print(f"wandb: logged offline in {folder}; `wandb sync {folder}` sends it to the server")
        if self.lock:
            self.lock.remove()


def _init(project: str, folder: Path, arguments: dict, name: str | None, mode: str, resumed_id: str | None):
    """A wandb run with settings that send nothing but what is logged; offline if the server cannot be reached."""
    import wandb

    settings = wandb.Settings(
        console="off",  # responses are printed, and conversations must not leave the machine
        disable_git=True,
        save_code=False,
        x_save_requirements=False,
        x_disable_meta=True,  # command line, paths, host and user name
        silent=True,
        init_timeout=30,  # seconds; after that the run is offline
    )
    config = {key: without_folders(value) for key, value in arguments.items()}
    call = dict(project=project, name=name, dir=str(folder.parent), config=config, settings=settings)
    if resumed_id:
        call |= dict(id=resumed_id, resume="allow")
    try:
        return wandb.init(mode=mode, **call)
    except (wandb.errors.CommError, wandb.errors.UsageError) as error:
        print(f"wandb: no connection ({first_line(error)}); this run is logged offline")
        return wandb.init(mode="offline", **{**call, "name": name or new_run_name(folder)})


def without_folders(value):
    """An option's value; of a path on this machine only the last part."""
    if isinstance(value, (list, tuple)):
        return [without_folders(item) for item in value]
    if isinstance(value, str) and "=" in value:  # --trl NAME=VALUE
        name, _, value = value.partition("=")
        return f"{name}={without_folders(value)}"
    is_path = isinstance(value, str) and "/" in value and (os.path.isabs(value) or os.path.exists(value))
    return os.path.basename(os.path.normpath(value)) if is_path else value


def _logged_in() -> bool:
    """Whether this user has a wandb key, found without asking the network or the user."""
    import wandb
    from requests.utils import get_netrc_auth

    settings = wandb.Settings()
    if os.environ.get("WANDB_API_KEY") or settings.api_key:
        return True
    servers = (os.environ.get("WANDB_BASE_URL"), settings.base_url, "https://api.wandb.ai")
    return any(get_netrc_auth(server) for server in servers if server)
