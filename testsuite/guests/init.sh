#!/bin/busybox sh
# /init of the busybox guest: says that it was reached, runs some commands, and turns the machine off; with `shell` on the kernel's command
# line it gives a shell instead.
/bin/busybox --install -s /bin
export PATH=/bin
echo "init reached"
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
uname -m
if grep -qw shell /proc/cmdline; then
    setsid sh -c 'exec sh </dev/ttyS0 >/dev/ttyS0 2>&1'
fi
dd if=/dev/zero of=/tmp/zeros bs=64k count=16 2>/dev/null
md5sum /tmp/zeros
gzip -c /tmp/zeros | gunzip -c | md5sum
i=0
while [ $i -lt 50 ]; do
    /bin/true
    i=$((i + 1))
done
echo "forked $i times"
poweroff -f
