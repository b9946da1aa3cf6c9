"""Connections are kept while they are fresh, and belong to one process; an answer is read whole or not at all."""

import gc
import os
import socket
import threading
import time
import weakref

import numpy as np
import pytest
from batchrules_tesseract import (
    TesseractClient,
    TesseractConnectionLostError,
    TesseractInputError,
    TesseractServerError,
    _connections,
)

X = np.arange(3.0)


@pytest.fixture
def connections(fake):
    """The addresses that requests came from."""
    seen = []

    def answer(handler):
        seen.append(handler.client_address)
        handler.reply({"y": 1}, 200)

    fake.answers["/apply"] = answer
    return seen


def says_close(handler):
    """Answer, and close the connection, as the headers say."""
    handler.server.fake.asked.append((handler.path, {}))
    handler.send_response(200)
    handler.send_header("Connection", "close")
    handler.end_headers()
    for part in (b'{"y": ', b"1}"):
        handler.wfile.write(part)
        handler.wfile.flush()
        time.sleep(0.02)


def in_chunks(handler):
    """Answer in chunks of unknown number."""
    handler.server.fake.asked.append((handler.path, {}))
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    handler.wfile.write(b'3\r\n{"y\r\n6\r\n": 1} \r\n0\r\n\r\n')


@pytest.mark.parametrize("answer", [says_close, in_chunks])
def test_an_answer_that_does_not_say_how_long_it_is(fake, answer):
    fake.answers["/apply"] = answer
    with TesseractClient(fake.url) as client:
        assert [client.apply({}), client.apply({})] == [{"y": 1}, {"y": 1}]
    assert fake.posts() == ["/apply"] * 2


def test_an_answer_that_claims_to_be_huge(fake):
    def answer(handler):
        handler.server.fake.asked.append((handler.path, {}))
        handler.send_response(200)
        handler.send_header("Content-Length", str(10**15))
        handler.end_headers()
        handler.wfile.write(b"{}")
        handler.close_connection = True

    fake.answers["/apply"] = answer
    with TesseractClient(fake.url) as client, pytest.raises(TesseractConnectionLostError):
        client.apply({})


def test_an_answer_of_no_bytes_leaves_the_connection_open(fake, connections):
    with TesseractClient(fake.url) as client:
        client.apply({})
        fake.answers["/jacobian"] = b""
        fake.status = 422
        with pytest.raises(TesseractInputError):
            client.jacobian({}, ["x"], ["y"])
        client.apply({})
    assert len(set(connections)) == 1


def test_a_connection_that_the_server_closed_is_not_used(fake, connections):
    with TesseractClient(fake.url) as client:
        fake.answers["/jacobian"] = says_nothing_and_closes
        client.apply({})
        client.jacobian({}, ["x"], ["y"])
        time.sleep(0.1)
        client.apply({})
    assert len(set(connections)) == 2


def says_nothing_and_closes(handler):
    """Answer, then close without a word, as a server does that is restarted."""
    handler.reply({"y": 1}, 200)
    handler.close_connection = True


def test_no_more_are_kept_than_was_said(fake, connections):
    together = threading.Barrier(3)
    counted = fake.answers["/apply"]
    fake.answers["/apply"] = lambda handler: (together.wait(10), counted(handler))
    with TesseractClient(fake.url, max_connections=1) as client:
        for _ in range(2):
            threads = [threading.Thread(target=client.apply, args=({},)) for _ in range(3)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    assert len(set(connections)) == 5


def test_closing_ends_a_request_under_way_with_its_answer(fake, connections):
    entered, free = threading.Event(), threading.Event()
    counted = fake.answers["/apply"]
    fake.answers["/apply"] = lambda handler: (entered.set(), free.wait(10), counted(handler))
    client = TesseractClient(fake.url)
    answers = []
    thread = threading.Thread(target=lambda: answers.append(client.apply({})))
    thread.start()
    assert entered.wait(10)
    client.close()
    free.set()
    thread.join()
    assert answers == [{"y": 1}]
    client.apply({})
    client.close()
    assert len(set(connections)) == 2


def test_a_client_that_is_forgotten_closes_its_connections(fake):
    # An open socket that is collected is a ResourceWarning, which is an error here.
    client = TesseractClient(fake.url)
    client.apply({"x": X})
    gone = weakref.ref(client)
    del client
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("error", [BrokenPipeError, ConnectionResetError])
def test_the_answer_counts_where_sending_failed(fake, monkeypatch, error):
    taken = _connections.Connections.take

    def take(self, deadline):
        connection = taken(self, deadline)
        send = connection.post

        def fails(*args):
            send(*args)
            raise error

        connection.post = fails
        return connection

    monkeypatch.setattr(_connections.Connections, "take", take)
    fake.status, fake.answers["/apply"] = 413, b"too large"
    with TesseractClient(fake.url) as client, pytest.raises(TesseractServerError, match=r"413.*too large"):
        client.apply({"x": X})


# The child makes one request and ends: the threads that Python and JAX warn of are not missed there.
@pytest.mark.filterwarnings("ignore:.*fork.*:RuntimeWarning", "ignore:.*fork.*:DeprecationWarning")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_process_opens_its_own(fake, connections):
    with TesseractClient(fake.url) as client:
        client.apply({})
        child = os.fork()
        if child == 0:
            # No test runs on in the child, whatever happens in it.
            try:
                client.apply({})
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        client.apply({})
    assert connections[0] == connections[2] != connections[1]


def test_a_small_request_is_one_packet():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        received = []

        def serve():
            connection, _ = listening.accept()
            with connection:
                received.append(connection.recv(1 << 16))
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\n" + b'{"y": 1}')

        thread = threading.Thread(target=serve)
        thread.start()
        with TesseractClient(f"http://127.0.0.1:{listening.getsockname()[1]}") as client:
            assert client.apply({"x": X}) == {"y": 1}
        thread.join()
    head, _, body = received[0].partition(b"\r\n\r\n")
    assert f"Content-Length: {len(body)}".encode() in head
    assert body.endswith(b"}}")


def test_a_server_that_answers_before_it_has_read_the_body():
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def refuse():
            connection, _ = listening.accept()
            with connection:
                connection.recv(1 << 10)
                connection.sendall(b"HTTP/1.1 413 Too Large\r\nConnection: close\r\nContent-Length: 9\r\n\r\ntoo large")
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(1 << 16):
                    pass

        thread = threading.Thread(target=refuse)
        thread.start()
        with (
            TesseractClient(f"http://127.0.0.1:{listening.getsockname()[1]}") as client,
            pytest.raises(TesseractServerError, match=r"413.*too large"),
        ):
            client.apply({"x": np.zeros(1 << 18)})
        thread.join()


@pytest.mark.parametrize("name", ["X-Bad\n", "X Bad:"])
def test_a_header_that_is_none(fake, name):
    with TesseractClient(fake.url, headers={name: "x"}) as client, pytest.raises(ValueError, match="header"):
        client.apply({"x": X})
    assert fake.posts() == []


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
def test_names_and_numbers_of_hosts(fake, host):
    with TesseractClient(fake.url.replace("127.0.0.1", host)) as client:
        np.testing.assert_array_equal(client.apply({})["y"], [1.0, 2.0])
