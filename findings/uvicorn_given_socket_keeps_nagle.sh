#!/usr/bin/env bash
# uvicorn 0.54.0 on asyncio (Python 3.11): a server that is handed its socket (`Server.run(sockets=[...])`, as a program
# does that must know its port, and as uvicorn does itself for `--workers 2`) leaves Nagle's algorithm on, so that an
# answer whose head and body are two packets waits for the client's delayed receipt, about 40 ms on Linux, on a
# connection that is kept. asyncio turns it off where the socket's protocol number is TCP's; a socket of
# `socket.create_server`, or of `uvicorn.Config.bind_socket`, has 0. Told host and port, uvicorn has it off.
# A good guess: how a server comes by its socket makes no difference to its connections.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/python -m pip install --quiet uvicorn==0.54.0
venv/bin/python - <<'PY'
import http.client
import socket
import threading
import time

import uvicorn


async def app(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


def no_delay(make):
    """Whether the connections of a server have Nagle's algorithm off."""
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error", loop="asyncio", lifespan="off")
    server, sockets = uvicorn.Server(config), make(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": sockets}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    client = http.client.HTTPConnection(*server.servers[0].sockets[0].getsockname())
    client.request("GET", "/")
    assert client.getresponse().read() == b"ok"
    (connection,) = server.server_state.connections
    own = connection.transport.get_extra_info("socket")
    found = bool(own.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
    server.should_exit = True
    client.close()
    thread.join()
    return found


found = {
    "host and port": no_delay(lambda config: None),
    "socket.create_server": no_delay(lambda config: [socket.create_server(("127.0.0.1", 0))]),
    "Config.bind_socket": no_delay(lambda config: [config.bind_socket()]),
}
print("Nagle's algorithm is off:", found)
assert found == {"host and port": True, "socket.create_server": False, "Config.bind_socket": False}
PY
