# Sourced by quickstart and check: installs what is missing (Debian 12 and later, Ubuntu 24.04 and later), finds or installs a
# LibTorch, and sets up a build folder. Everything here may be called twice and does nothing the second time.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
torch_requirement='torch==2.13.0'

say() { printf '== %s\n' "$*" >&2; }
die() { printf '%s\n' "$*" >&2; exit 1; }

# A compile that includes LibTorch takes up to 2 GB: as many at once as there are cores and memory for.
jobs_at_once() {
  local cores memory_gb
  cores=$(nproc)
  memory_gb=$(awk '/^MemAvailable:/ { print int($2 / 1048576) }' /proc/meminfo)
  local fit=$(( memory_gb / 2 ))
  (( fit >= 1 )) || fit=1
  echo $(( cores < fit ? cores : fit ))
}

as_root() {
  if [ "$(id -u)" = 0 ]; then
    "$@"
  elif command -v sudo > /dev/null; then
    sudo ${VARVE_SUDO_FLAGS:-} "$@"
  else
    die "needs root to install packages: run as root, install sudo, or install by hand: ${missing_packages[*]:-}"
  fi
}

is_installed() { [ "$(dpkg-query -W -f '${db:Status-Status}' "$1" 2> /dev/null)" = installed ]; }

apt_updated=no
apt_update() {
  [ "$apt_updated" = no ] || return 0
  as_root env DEBIAN_FRONTEND=noninteractive apt-get update -q < /dev/null >&2 || say 'apt-get update failed; going on with the lists that are here'
  apt_updated=yes
}

apt_install() {
  as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "$@" < /dev/null >&2
}

# Boost 1.81 or newer: the distribution's default where that is new enough, or where a part of it is here already (two versions do not
# live together, and 1.74 will do for all but the backend asio); else the packages that carry the number.
boost_packages() {
  local default
  default=$(apt-cache policy libboost-dev 2> /dev/null | awk '/Candidate:/ { print $2 }')
  if is_installed libboost-dev || is_installed libboost1.74-dev; then
    echo libboost-dev libboost-program-options-dev libboost-test-dev
  elif [ -n "$default" ] && [ "$default" != '(none)' ] && dpkg --compare-versions "$default" ge 1.81; then
    echo libboost-dev libboost-program-options-dev libboost-test-dev
  else
    echo libboost1.81-dev libboost-program-options1.81-dev libboost-test1.81-dev
  fi
}

# Already there, under whichever name: the headers and the two libraries.
has_boost() {
  printf '%s\n' '#include <boost/version.hpp>' '#if BOOST_VERSION < 107400 || !__has_include(<boost/test/unit_test.hpp>)' '#error' '#endif' 'int main() {}' |
    c++ -x c++ - -o /dev/null -Wl,--no-as-needed -lboost_unit_test_framework -lboost_program_options 2> /dev/null
}

# install_packages [MORE...]: the packages that the build needs, and MORE.
install_packages() {
  command -v dpkg-query > /dev/null || { say 'no dpkg here: packages are left to you (see README.md)'; return 0; }
  missing_packages=()
  local pair
  for pair in c++:g++ meson:meson ninja:ninja-build pkg-config:pkg-config git:git python3:python3 gnuplot:gnuplot-nox "$@"; do
    # COMMAND:PACKAGE is there when the command is, PACKAGE when it is installed.
    case $pair in
      *:*) command -v "${pair%%:*}" > /dev/null || missing_packages+=("${pair#*:}") ;;
      *) is_installed "$pair" || missing_packages+=("$pair") ;;
    esac
  done
  for pair in liburing-dev libssl-dev nlohmann-json3-dev libxxhash-dev libyaml-cpp-dev ca-certificates; do
    is_installed "$pair" || missing_packages+=("$pair")
  done
  python3 -c 'import ensurepip' 2> /dev/null || missing_packages+=(python3-venv)
  local need_boost=no
  has_boost || need_boost=yes
  if (( ${#missing_packages[@]} )) || [ $need_boost = yes ]; then
    apt_update
    # Which name Boost has is known only once the lists are here.
    [ $need_boost = no ] || read -ra boost <<< "$(boost_packages)"
    missing_packages+=(${boost[@]+"${boost[@]}"})
    say "installing ${missing_packages[*]}"
    apt_install "${missing_packages[@]}" || die "could not install: ${missing_packages[*]}. Install them by hand and run this again."
  fi
}

find_libtorch() { python3 "$root/backends/torch/find_libtorch.py" "$1" "$root" 2> /dev/null; }

venv_python=$root/.venv/bin/python3

# ensure_venv: a Python with torch, numpy and safetensors, for LibTorch itself and for the tests that ask Python.
ensure_venv() {
  local want=("$torch_requirement" numpy safetensors) flags=()
  if [ -f "$root/.venv/varve-complete" ] && [ -x "$venv_python" ]; then
    return 0
  fi
  if find_libtorch python3 > /dev/null; then
    # This python3 brings its own torch (with CUDA, perhaps): look through to it, and add only what it lacks.
    want=(numpy safetensors)
    flags=(--system-site-packages)
  fi
  if ! "$venv_python" -c 'import torch, numpy, safetensors' 2> /dev/null; then
    say "making .venv with ${want[*]}"
    python3 -m venv ${flags[@]+"${flags[@]}"} "$root/.venv" >&2 && "$venv_python" -m pip install --quiet "${want[@]}" < /dev/null >&2 || return 1
    "$venv_python" -c 'import torch, numpy, safetensors' || return 1
  fi
  touch "$root/.venv/varve-complete"
}

# ensure_cufile: with a CUDA toolkit that lacks cuFile, the header and the library that pip has, so that the backend gds is compiled.
ensure_cufile() {
  python3 "$root/backends/cuda/find_toolkit.py" > /dev/null 2>&1 || return 0
  python3 "$root/backends/gds/find_cufile.py" "$root" > /dev/null 2>&1 && return 0
  [ -x "$venv_python" ] || return 0
  say 'fetching cuFile for the backend gds'
  "$venv_python" -m pip install --quiet --no-deps nvidia-cufile < /dev/null >&2 || say 'no cuFile: the backend gds is left out'
}

# install_system_libtorch: the distribution's.
install_system_libtorch() {
  is_installed libtorch-dev && find_libtorch system > /dev/null && return 0
  command -v apt-get > /dev/null || return 1
  apt_update
  missing_packages=(libtorch-dev libopenblas0-pthread)
  say "installing ${missing_packages[*]}"
  apt_install "${missing_packages[@]}" && find_libtorch system > /dev/null
}

# ensure_libtorch: after it, Meson finds one by itself; without any, everything but bench, train and .pt files still builds.
ensure_libtorch() {
  ensure_venv || say '.venv could not be made (pip failed); trying the distribution'
  ensure_cufile
  find_libtorch '' > /dev/null && return 0
  install_system_libtorch && return 0
  say 'no LibTorch: the backend torch is left out'
}

# configure FOLDER [MESON OPTIONS...]: sets it up, or looks again at what the machine has. A folder that cannot be set up again (another
# Meson made it, say) is made anew.
configure() {
  local folder=$1 log
  shift
  log=$(mktemp) || return 1
  if { [ -f "$folder/build.ninja" ] && meson setup --reconfigure "$folder" "$root" "$@" > "$log" 2>&1 < /dev/null; } ||
    { rm -rf "$folder" && meson setup "$folder" "$root" "$@" > "$log" 2>&1 < /dev/null; }; then
    rm -f "$log"
  else
    cat "$log" >&2
    rm -f "$log"
    return 1
  fi
}
