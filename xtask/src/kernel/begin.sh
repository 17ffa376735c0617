# begin.sh: what the guest does before its work, as root of a copy of the host's files
set -euo pipefail
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root NO_COLOR=1 TERM=dumb
# An emulated CPU needs its time for the kernel's part.
export THYRA_PACKETS=100
# All scenarios but one need no Envoy, which it would read for a long time.
export THYRA_ENVOY=off
# Not over /tmp, where the tree may lie; the overlay takes what is written there.
mount -t tmpfs tmpfs /run
mount -t bpf bpf /sys/fs/bpf
mount -t cgroup2 cgroup2 /sys/fs/cgroup
ip link set lo up
modprobe -a veth sch_ingress cls_bpf tun
echo "guest: Linux $(uname -r), up after $(cut -d' ' -f1 /proc/uptime) s"
