#!/usr/bin/env bash
# Gets what `make test-deploy` runs beside Python: an engine for containers, a way to a base image, promtool.
# On Debian as root it installs what is missing; elsewhere it says what to install and leaves the rest to the tests.
set -euo pipefail
missing=()
command -v podman >/dev/null || command -v docker >/dev/null || missing+=(podman runc uidmap netavark aardvark-dns)
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
