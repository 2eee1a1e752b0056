"""train.py in processes of its own, forked from one that has imported all, so that a start takes no seconds."""
import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

import data.images
import data.training_set
import models.whale_net
import train
from tests.conftest import SmallBackbone, arguments, together
from utils.files import write_whole

CONTEXT = multiprocessing.get_context('forkserver')
CONTEXT.set_forkserver_preload(['tests.forks'])
CALLS = [(os, 'replace'), (os, 'link'), (os, 'unlink'), (os, 'fsync'), (Path, 'unlink'), (Path, 'write_text'), (torch, 'save'),
         (pd.DataFrame, 'to_csv'), (np, 'save'), (data.training_set, 'load_tables'), (train, 'predict'),
         (data.images.Crops, '_decode')]
WRITERS = 'write_text save to_csv'.split()


def signal_itself(at, when, number, only):
    """At the `at`-th of CALLS ('before' or 'after' it; what was written is then cut in half) the process gets a signal.
    Returns the list that grows with each call."""
    made = []
    for owner, name in CALLS:
        if only in (None, name):
            def call(*args, real=getattr(owner, name), name=name, **options):
                made.append(name)
                mine = len(made) == at
                if mine and when == 'before':
                    os.kill(os.getpid(), number)
                result = real(*args, **options)
                if mine and when == 'after':
                    for part in Path('results').rglob('.*-*') if name in WRITERS else ():
                        os.truncate(part, part.stat().st_size // 2)
                    os.kill(os.getpid(), number)
                return result
            setattr(owner, name, call)
    return made


def work_on(argv, folder, prepare, at=None, when='before', number=signal.SIGKILL, only=None):
    os.setpgid(0, 0)
    began = time.monotonic()
    os.chdir(folder)
    for stream, name in ((1, 'out'), (2, 'err')):
        os.dup2(os.open(f'{name}{os.getpid()}', os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    models.whale_net.build_backbone = SmallBackbone
    tqdm.set_lock(threading.RLock())  # its own would outlive a killed process
    train.plot_curves = lambda table, path: write_whole(path, lambda part: Path(part).write_text('a picture'))
    made = signal_itself(at, when, number, only)
    if prepare:
        prepare()
    try:
        train.main(argv)
    finally:
        Path('calls').write_text(f'{len(made)} {time.monotonic() - began}')


def start(folder, settings, prepare=None, **how):
    """A process at work in `folder`; `prepare` is called in it first; `how`: see `signal_itself`."""
    process = CONTEXT.Process(target=work_on, args=(arguments(**together(**settings)), folder, prepare), kwargs=how)
    process.start()
    return process


def finish(process, folder):
    """Its exit code, out, err, once it has ended."""
    process.join()
    files = [folder / f'{name}{process.pid}' for name in ('out', 'err')]
    out, err = (file.read_text() if file.exists() else '' for file in files)
    return SimpleNamespace(code=process.exitcode, out=out, err=err)
