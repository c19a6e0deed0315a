"""Ends a rank at the moment that an order names. Python imports this file by its name at its start.

bench/chaos.py puts this folder on PYTHONPATH, and orders into the folder of SHOAL_CHAOS_ORDERS:

    order.json    {"number": 7, "moment": "evaluation", "rank": 1, "count": 12, "fraction": 0.4}
    done-7.json   {"moment": "evaluation", ...}: written right before this process kills itself

`step` is after the count-th step since the order was seen; `evaluation` and `upload` are at a
fraction of the time that the last one took; `parts` is between the parts and the manifest.
Everything else in the process is untouched.
"""

import importlib.abc
import importlib.util
import json
import os
import signal
import sys
import threading
import time

_FOLDER = os.environ.get("SHOAL_CHAOS_ORDERS")
_FIRST_GUESS_SECONDS = 0.05


class _Orders:
    """The present order, and the end of this process."""

    def __init__(self):
        self._seen = 0
        self._steps = 0
        self._spans = {}
        self._inside = set()

    def read(self, rank, world_size):
        """The order if it is for this rank, else None."""
        try:
            with open(os.path.join(_FOLDER, "order.json"), encoding="utf-8") as file:
                order = json.load(file)
        except (FileNotFoundError, ValueError):
            return None
        if order["number"] != self._seen:
            self._seen, self._steps = order["number"], 0
        return order if order["rank"] % world_size == rank else None

    def end(self, order, moment, attempt, step):
        if moment in ("evaluation", "upload") and moment not in self._inside:
            moment = "step"  # it was over before
        path = os.path.join(_FOLDER, f"done-{order['number']}.json")
        with open(path + ".part", "w", encoding="utf-8") as file:
            json.dump({"moment": moment, "attempt": attempt, "step": step}, file)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(path + ".part", path)
        except FileExistsError:
            return  # another rank was faster
        os.kill(os.getpid(), signal.SIGKILL)

    def stepped(self, rank, attempt, step, world_size):
        order = self.read(rank, world_size)
        if order and order["moment"] == "step":
            self._steps += 1
            if self._steps == order["count"]:
                self.end(order, "step", attempt, step)

    def around(self, moment, whole, order, attempt, step):
        """What `whole` gives; if ordered, this process ends meanwhile."""
        began = time.monotonic()
        self._inside.add(moment)
        try:
            if order and order["moment"] == moment:
                delay = order["fraction"] * self._spans.get(moment, _FIRST_GUESS_SECONDS)
                timer = threading.Timer(delay, self.end, (order, moment, attempt, step))
                timer.daemon = True
                timer.start()
            return whole()
        finally:
            self._inside.discard(moment)
            self._spans[moment] = time.monotonic() - began


def _arm_worker(module):
    orders, rank_class = _ORDERS, module._Rank
    stepped, measure = rank_class.stepped, rank_class._measure

    def place(rank):
        session = rank._session
        return session.rank, session.world_size, rank._attempt.attempt, rank._step

    def stepped_and_ended(self, batch, progress):
        stepped(self, batch, progress)
        rank, world_size, attempt, step = place(self)
        orders.stepped(rank, attempt, step, world_size)

    def measured(self, *args, **kwargs):
        rank, world_size, attempt, step = place(self)
        order = orders.read(rank, world_size)
        return orders.around(
            "evaluation", lambda: measure(self, *args, **kwargs), order, attempt, step
        )

    rank_class.stepped, rank_class._measure = stepped_and_ended, measured


def _arm_checkpoint(module):
    orders, writer = _ORDERS, module.CheckpointWriter
    upload = writer._upload

    def uploaded(self, *args, **kwargs):
        attempt = self._attempt.attempt
        order = orders.read(0, 1)  # an upload is rank 0's, whatever rank was drawn
        given = orders.around("upload", lambda: upload(self, *args, **kwargs), order, attempt, 0)
        if order and order["moment"] == "parts":
            orders.end(order, "parts", attempt, 0)
        return given

    writer._upload = uploaded


_ARMED = {"trainers.worker": _arm_worker, "trainers.checkpoint": _arm_checkpoint}


class _Finder(importlib.abc.MetaPathFinder):
    """Arms the modules of _ARMED once they are loaded."""

    def find_spec(self, name, path=None, target=None):
        arm = _ARMED.pop(name, None)
        spec = importlib.util.find_spec(name) if arm else None
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_arm(module):
            execute(module)
            arm(module)

        spec.loader.exec_module = execute_and_arm
        return spec


if _FOLDER:
    _ORDERS = _Orders()
    sys.meta_path.insert(0, _Finder())
