#!/usr/bin/env bash
# Make a CA, the SuperLink's TLS certificate and one key pair per SuperNode, in a new folder; and
# the file that says which partition is whose, partitions.
#
#   keys.sh FOLDER NODES [HOST...]
#
# HOST: further names or IP addresses under which SuperNodes reach the SuperLink.
set -euo pipefail
umask 077 # what is made here is its owner's alone: private keys get mode 600

die() {
    echo "keys.sh: $1" >&2
    exit 2
}

[ $# -ge 2 ] || die "usage: keys.sh FOLDER NODES [HOST...]"
folder=$1 nodes=$2
shift 2
[[ $nodes =~ ^[0-9]+$ ]] || die "NODES $nodes: must be a whole number"
[ ! -e "$folder" ] || die "FOLDER $folder: exists already; name a new one"
for tool in openssl ssh-keygen; do
    command -v "$tool" >/dev/null || die "$tool is not installed"
done
names=DNS:localhost,IP:127.0.0.1,IP:::1
for host in "$@"; do
    [[ $host =~ ^[A-Za-z0-9.:-]+$ ]] || die "HOST $host: neither a name nor an IP address"
    [[ $host =~ ^[0-9.]+$ || $host == *:* ]] && names+=,IP:$host || names+=,DNS:$host
done

mkdir -p "$folder"
cd "$folder"
cat >openssl.cnf <<END
[req]
distinguished_name = subject
[subject]
[ca]
basicConstraints = critical,CA:TRUE,pathlen:0
keyUsage = critical,keyCertSign,cRLSign
subjectKeyIdentifier = hash
[server]
basicConstraints = critical,CA:FALSE
keyUsage = critical,digitalSignature
extendedKeyUsage = serverAuth
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid
subjectAltName = $names
END
for name in ca superlink; do
    openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out $name.key
done
openssl req -config openssl.cnf -new -x509 -extensions ca -key ca.key -days 3650 \
    -subj "/CN=fedsam CA" -out ca.pem
openssl req -config openssl.cnf -new -key superlink.key -subj "/CN=fedsam SuperLink" |
    openssl x509 -req -CA ca.pem -CAkey ca.key -CAcreateserial -days 365 \
        -extfile openssl.cnf -extensions server -out superlink.pem 2>/dev/null
openssl verify -x509_strict -CAfile ca.pem superlink.pem >/dev/null

# Flower reads SuperNode keys in OpenSSH's format, which openssl does not write
for ((node = 0; node < nodes; node++)); do
    ssh-keygen -q -t ecdsa -b 384 -N "" -C "node-$node" -f "node-$node"
    echo "$node $(cat "node-$node.pub")" >>partitions # whose partition is whose: node-keys
done
rm -f openssl.cnf ca.srl
echo "made $folder: CA, certificate for $names, keys of $nodes SuperNodes"
