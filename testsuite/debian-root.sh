#!/bin/sh
# Makes a Debian root file system that `bivisor boot` starts from a virtio disk, with Debian's own tools and without root's rights, into a
# directory: root.img (ext4), vmlinuz and initrd.img out of it. Root logs in on the serial line without a password. Nothing of it is ever
# committed.
set -eu
if [ $# -lt 1 ] || [ $# -gt 3 ]; then
    echo "usage: $0 DIRECTORY [SIZE] [FLAVOUR]    (size of the image: 2G; kernel: cloud-amd64 or amd64)" >&2
    exit 2
fi
for tool in mmdebstrap fakeroot fakechroot mkfs.ext4 tar; do
    command -v "$tool" >/dev/null || [ -x "/usr/sbin/$tool" ] || {
        echo "$0: needs $tool; on Debian: apt-get install mmdebstrap fakeroot fakechroot e2fsprogs tar" >&2
        exit 1
    }
done
mkdir -p "$1"
cd "$1"
size=${2:-2G}
flavour=${3:-cloud-amd64}

# The initramfs holds what mounts the root and no more: a small one is quickly unpacked.
modules='mkdir -p "$1/etc/initramfs-tools/conf.d"
echo MODULES=list >"$1/etc/initramfs-tools/conf.d/bivisor"
printf "virtio_pci\nvirtio_blk\next4\n" >"$1/etc/initramfs-tools/modules"'

mmdebstrap --mode=fakechroot --variant=minbase \
    --include=systemd-sysv,udev,dbus,login,kmod,iproute2,initramfs-tools,"linux-image-$flavour" \
    --essential-hook="$modules" \
    --customize-hook='echo bivisor >"$1/etc/hostname"' \
    --customize-hook='echo "/dev/vda / ext4 defaults 0 1" >"$1/etc/fstab"' \
    --customize-hook='chroot "$1" passwd --delete root' \
    bookworm root.tar

# Owners are what fakeroot remembers, so unpacking and making the image are one command.
rm -rf unpacked root.img
mkdir unpacked
PATH=$PATH:/usr/sbin fakeroot sh -c "tar -xf root.tar -C unpacked && truncate -s $size root.img && mkfs.ext4 -q -F -d unpacked root.img"
cp unpacked/boot/vmlinuz-* vmlinuz
cp unpacked/boot/initrd.img-* initrd.img
chmod -R u+w unpacked
rm -rf unpacked root.tar
echo "In $1: root.img vmlinuz initrd.img. Now:"
echo "  bivisor boot --kernel $1/vmlinuz --initrd $1/initrd.img --drive file=$1/root.img,format=raw \\"
echo "      --append 'root=/dev/vda console=ttyS0' --memory 1024"
echo "or BIVISOR_DEBIAN=$1 cargo test --release --test debian -- --nocapture"
