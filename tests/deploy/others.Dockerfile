# Redis and Prometheus for the tests, of Debian's packages: what a machine that reaches no registry of images can have.
ARG BASE=python:3.11-slim
FROM ${BASE}
# Without a configuration Redis answers its own machine alone; the official image lifts that in the same way.
# hadolint ignore=DL3008  # any version that the base's distribution has will do
RUN apt-get update \
    && apt-get install --yes --no-install-recommends prometheus redis-server \
    && rm -rf /var/lib/apt/lists/* \
    && printf '#!/bin/sh\nexec /usr/bin/redis-server "$@" --protected-mode no\n' > /usr/local/bin/redis-server \
    && chmod 755 /usr/local/bin/redis-server \
    && mkdir -p /data /prometheus \
    && chown 10001:10001 /data /prometheus
WORKDIR /data
USER 10001:10001
CMD ["prometheus", "--config.file=/etc/prometheus/prometheus.yml", "--storage.tsdb.path=/prometheus"]
