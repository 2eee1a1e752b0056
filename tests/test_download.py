"""Weights come over https, whole and as their hash says, or not at all; all servers stand on this machine."""
import hashlib
import http.client
import socket
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
import torch

import models.backbone as backbones
from models.backbone import build_backbone, load_imagenet
from utils.errors import UserError


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append(self.path)
        self.server.answer(self)

    def log_message(self, *_):
        pass


@contextmanager
def server(answer):
    with ThreadingHTTPServer(('127.0.0.1', 0), Handler) as one:
        one.answer, one.asked, one.daemon_threads = answer, [], True
        thread = threading.Thread(target=one.serve_forever, kwargs=dict(poll_interval=0.01))
        thread.start()
        try:
            yield one
        finally:
            one.shutdown()
            thread.join()


def send(handler, body, length=None, code=200, **headers):
    handler.send_response(code)
    for name, value in dict({'Content-Length': len(body) if length is None else length}, **headers).items():
        handler.send_header(name, str(value))
    handler.end_headers()
    handler.wfile.write(body)


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """load(answer, ...) fetches the small network's weights from servers that answer so; `https` here is http in truth."""
    class Plain(http.client.HTTPConnection):
        def __init__(self, *args, context=None, check_hostname=None, **more):
            super().__init__(*args, **more)

    monkeypatch.setattr(http.client, 'HTTPSConnection', Plain)
    monkeypatch.setenv('no_proxy', '*')
    model = build_backbone('seresnext14', 64, 128)
    state = {key: value[:, :3] if key == 'layer0.conv1.weight' else value for key, value in model.state_dict().items()}
    torch.save(state, tmp_path / 'whole.pth')
    whole = (tmp_path / 'whole.pth').read_bytes()
    name = f'small-{hashlib.sha256(whole).hexdigest()[:8]}.pth'
    monkeypatch.setitem(backbones.WEIGHTS, 'seresnext14', ('v0', name))

    def load(*ports):
        monkeypatch.setattr(backbones, '_MIRRORS', [f'https://127.0.0.1:{port}/{{folder}}/{{name}}' for port in ports])
        load_imagenet(model, 'seresnext14', tmp_path / 'weights')
        return (tmp_path / 'weights' / name).read_bytes()

    return SimpleNamespace(load=load, whole=whole, folder=tmp_path / 'weights')


def refused(mirror, answer, cause):
    with server(answer) as one:
        with pytest.raises(UserError, match=f'no mirror gave .*{cause}'):
            mirror.load(one.server_port)
    assert not list(mirror.folder.iterdir())


def test_a_mirror_may_send_on_to_another_that_is_https(mirror):
    with server(lambda handler: send(handler, mirror.whole)) as one:
        place = f'https://127.0.0.1:{one.server_port}/x'
        with server(lambda handler: send(handler, b'', code=302, Location=place)) as other:
            assert mirror.load(other.server_port) == mirror.whole


def test_a_mirror_that_sends_on_to_plain_http_is_refused(mirror):
    with server(lambda handler: send(handler, mirror.whole)) as one:
        place = f'http://127.0.0.1:{one.server_port}/x'
        refused(mirror, lambda handler: send(handler, b'', code=302, Location=place), 'not https')
        assert one.asked == []


def test_nor_to_ftp(mirror):
    refused(mirror, lambda handler: send(handler, b'', code=302, Location='ftp://127.0.0.1/x'), 'not https')


@pytest.mark.parametrize('place', ['file:///etc/passwd', 'https://[', '//', ''])
def test_a_mirror_that_sends_on_to_nowhere_is_refused(mirror, place):
    refused(mirror, lambda handler: send(handler, b'', code=302, Location=place), '')


def test_a_file_of_another_hash_is_not_kept(mirror):
    refused(mirror, lambda handler: send(handler, mirror.whole + b'x'), 'hash')


@pytest.mark.parametrize('length', [None, 'whole', 'strange'])
def test_a_file_that_is_cut_off_is_not_kept(mirror, length):
    claimed = {None: 1000, 'whole': len(mirror.whole), 'strange': 'many'}[length]
    refused(mirror, lambda handler: send(handler, mirror.whole[:1000], claimed), '')


def test_an_answer_that_is_none_is_refused(mirror):
    refused(mirror, lambda handler: handler.wfile.write(b'\0\0nonsense\r\n\r\n'), '')
    refused(mirror, lambda handler: send(handler, b'', code=404), '404')


def test_the_next_mirror_is_asked(mirror):
    with server(lambda handler: send(handler, b'', code=503)) as one, server(lambda handler: send(handler, mirror.whole)) as two:
        assert mirror.load(one.server_port, two.server_port) == mirror.whole


@pytest.mark.parametrize('start', [b'', b'HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nsome'])
def test_a_mirror_that_falls_silent_is_given_up(mirror, monkeypatch, start):
    monkeypatch.setattr(backbones, 'SILENCE', 0.2)
    with socket.create_server(('127.0.0.1', 0)) as one:
        def accept():
            connection, _ = one.accept()
            connection.sendall(start)
            done.wait(30)
            connection.close()

        done = threading.Event()
        thread = threading.Thread(target=accept)
        thread.start()
        try:
            with pytest.raises(UserError, match='timed out'):
                mirror.load(one.getsockname()[1])
        finally:
            done.set()
            thread.join()
    assert not list(mirror.folder.iterdir())


def test_what_a_killed_download_left_is_removed(mirror):
    mirror.folder.mkdir()
    (mirror.folder / '.part-killed.pth').write_text('half')
    with server(lambda handler: send(handler, mirror.whole)) as one:
        assert mirror.load(one.server_port) == mirror.whole
    assert len(list(mirror.folder.iterdir())) == 1
