#!/usr/bin/env bash
# Gets what `make test-deploy` runs beside Python: an engine for containers, a way to a base image, promtool.
# On Debian as root it installs what is missing; elsewhere it says what to install and leaves the rest to the tests.
set -euo pipefail
missing=()
# A docker client is often there without a daemon to talk to.
command -v podman >/dev/null || docker info >/dev/null 2>&1 || missing+=(podman runc uidmap netavark aardvark-dns)
command -v iptables >/dev/null || missing+=(iptables) # what netavark opens networks with
command -v debootstrap >/dev/null || missing+=(debootstrap)
command -v promtool >/dev/null || missing+=(prometheus)
if [ ${#missing[@]} -gt 0 ]; then
  if command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
  else
    echo "not here, so what needs it is skipped: ${missing[*]}"
  fi
fi
