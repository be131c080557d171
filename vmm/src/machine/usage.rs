//! Counters of a machine.

use std::{
    os::unix::fs::FileExt,
    sync::{Arc, atomic::Ordering},
};

use virtio_devices::{block, net, vsock::Vsock};
use vmm_protocol::control::Usage;

use super::{Machine, slot};

/// Counters that devices keep.
#[derive(Debug, Default)]
pub struct Counters {
    pub block: Option<Arc<block::Counters>>,
    pub net: Option<Arc<net::Counters>>,
}

impl Counters {
    /// All counters.
    pub fn read(&self, machine: &Machine) -> Usage {
        let vcpu_us = machine.vcpus.iter().map(|vcpu| vcpu.cpu_time().as_micros() as u64).sum::<u64>();
        let process = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
        let process_us = process.tv_sec.max(0) as u64 * 1_000_000 + process.tv_nsec.max(0) as u64 / 1000;
        let mut status = vec![0; 8192];
        let length = machine.process_files.status.read_at(&mut status, 0).unwrap_or(0);
        let status = String::from_utf8_lossy(&status[..length]);
        let streams = machine.device(slot::VSOCK, |transport| transport.device_as::<Vsock>().map(|vsock| vsock.bytes())).flatten().unwrap_or_default();
        let block = self.block.as_ref();
        let net = self.net.as_ref();
        Usage {
            vcpu_us,
            vmm_us: process_us.saturating_sub(vcpu_us),
            private_bytes: kib(&status, "RssAnon:") * 1024,
            peak_resident_bytes: kib(&status, "VmHWM:") * 1024,
            block_read_bytes: block.map_or(0, |block| block.read_bytes.load(Ordering::Relaxed)),
            block_written_bytes: block.map_or(0, |block| block.written_bytes.load(Ordering::Relaxed)),
            net_sent_bytes: net.map_or(0, |net| net.sent_bytes.load(Ordering::Relaxed)),
            net_received_bytes: net.map_or(0, |net| net.received_bytes.load(Ordering::Relaxed)),
            stream_sent_bytes: streams.from_guest,
            stream_received_bytes: streams.to_guest,
            exits: machine.vcpus.iter().map(|vcpu| vcpu.exits()).sum(),
        }
    }
}

/// A value in KiB of `/proc/self/status`.
fn kib(status: &str, key: &str) -> u64 {
    status.lines().find_map(|line| line.strip_prefix(key)).and_then(|rest| rest.trim().strip_suffix("kB")).and_then(|number| number.trim().parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    #[test]
    fn values_are_found() {
        let status = "VmPeak:\t  100 kB\nRssAnon:\t     132 kB\nThreads:\t1\n";
        assert_eq!((super::kib(status, "RssAnon:"), super::kib(status, "VmHWM:")), (132, 0));
    }
}
