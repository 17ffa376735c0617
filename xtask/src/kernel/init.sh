#!/bin/sh
# init.sh: process 1 of the guest's initial file system: mounts the host's root, read-only under an overlay, and goes on there
set -euo pipefail
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
for module in /modules/*.ko; do insmod "$module"; done
if ! mount -t virtiofs host /host; then
  echo "guest: the host's files can't be mounted"
  poweroff -f
fi
mount -t tmpfs tmpfs /over
mkdir /over/upper /over/work
mount -t overlay -o lowerdir=/host,upperdir=/over/upper,workdir=/over/work overlay /new
cp /work.sh /new/thyra-work.sh
release=$(cut -d' ' -f3 /proc/version)
mkdir -p "/new/lib/modules/$release"
mount -o bind "/host$(cat /modules/folder)" "/new/lib/modules/$release"
for folder in proc sys dev; do mount -o move "/$folder" "/new/$folder"; done
exec switch_root /new /bin/bash /thyra-work.sh
