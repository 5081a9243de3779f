#!/bin/sh
# Fetches the kernels that `bivisor boot` is tried with, as Debian packages, into a directory: vmlinuz-cloud, vmlinuz-amd64, bios.bin and an
# initramfs of busybox whose /init runs a script of commands and turns the machine off. Nothing of it is ever committed.
set -eu
if [ $# -ne 1 ]; then
    echo "usage: $0 DIRECTORY" >&2
    exit 2
fi
for tool in apt-get dpkg-deb cpio gzip; do
    command -v "$tool" >/dev/null || { echo "$0: needs $tool" >&2; exit 1; }
done
mkdir -p "$1/packages"
here=$(cd "$(dirname "$0")" && pwd)
cd "$1"

# The package that a metapackage depends on.
newest() {
    apt-cache depends "$1" | sed -n 's/^ *Depends: \(linux-image-[0-9].*\)$/\1/p' | head -n 1
}

fetch() {
    (cd packages && apt-get download "$1" >/dev/null)
    rm -rf "unpacked-$2"
    dpkg-deb -x packages/"$1"_*.deb "unpacked-$2"
}

for flavour in cloud-amd64 amd64; do
    fetch "$(newest "linux-image-$flavour")" "$flavour"
    cp unpacked-"$flavour"/boot/vmlinuz-* "vmlinuz-${flavour%-amd64}"
done
fetch seabios bios
cp unpacked-bios/usr/share/seabios/bios.bin .
fetch busybox-static busybox
rm -rf root
mkdir -p root/bin root/proc root/sys root/dev root/tmp
cp unpacked-busybox/bin/busybox root/bin/
cp "$here/guests/init.sh" root/init
chmod 755 root/init
(cd root && find . | cpio -o -H newc 2>/dev/null | gzip -9) >initramfs.gz
echo "In $1: vmlinuz-cloud vmlinuz-amd64 bios.bin initramfs.gz. Now:"
echo "  bivisor boot --kernel $1/vmlinuz-cloud --initrd $1/initramfs.gz --append 'console=ttyS0 quiet'"
