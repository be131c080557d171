# Finishes the root of the base image; $1 is the root, $2 the directory of the stand-in for dnf.
set -eu
root=$1
install -m 755 "$2/dnf" "$root/usr/local/bin/dnf"
ln -s dnf "$root/usr/local/bin/microdnf"
ln -s dnf "$root/usr/local/bin/yum"
ln -s /usr/bin/python3 "$root/usr/local/bin/python"
# There is one application in a microVM: pip may install for the whole system, as in the official Python images.
rm -f "$root"/usr/lib/python3*/EXTERNALLY-MANAGED
# mmdebstrap copies these from the host; an image must not know where it was made.
echo localhost >"$root/etc/hostname"
printf '127.0.0.1 localhost\n::1 localhost\n' >"$root/etc/hosts"
: >"$root/etc/resolv.conf"
: >"$root/etc/machine-id"
rm -rf "$root"/var/cache/apt/*.bin "$root"/var/cache/debconf/*-old "$root"/var/lib/dpkg/*-old
echo 'Dormouse base image: Debian 12 with Python; dnf, microdnf and yum are stand-ins for apt-get.' >"$root/etc/dormouse-base"
chmod 755 "$root"
