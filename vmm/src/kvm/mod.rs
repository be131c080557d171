//! The ioctl layer: one virtual machine and its vCPUs in the kernel.
//!
//! Owns: every KVM ioctl of this process, the vCPU threads, and the order in which state is read and written. Never emulates
//! a device (that is [`crate::devices`]) and never decides what guest memory holds.

pub mod cpuid;
#[cfg(test)]
mod dirty;
pub mod msr;
pub mod probe;
pub mod state;
pub mod vcpu;
pub mod vm;

/// What KVM did not do.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    /// An ioctl failed.
    #[error("{doing} failed{detail}")]
    Ioctl {
        /// The ioctl and what it was for.
        doing: &'static str,
        /// Empty, or `: ` and what it was about.
        detail: String,
        /// The kernel's reason.
        #[source]
        source: std::io::Error,
    },
    /// The kernel lacks something that nothing replaces.
    #[error("this kernel's KVM lacks {0}")]
    Lacks(&'static str),
    /// The saved state is not for this host or not well formed.
    #[error("{0}")]
    BadState(String),
    /// A vCPU thread has ended before its time.
    #[error("the thread of a vCPU has ended")]
    ThreadGone,
    /// A vCPU did not stop.
    #[error("vCPU {vcpu} did not stop within {limit_ms} ms")]
    NotStopped {
        /// Which one.
        vcpu: u8,
        /// How long it had.
        limit_ms: u64,
    },
}

impl KvmError {
    /// Whether a file is to blame, not the host.
    pub fn is_bad_state(&self) -> bool {
        matches!(self, Self::BadState(_))
    }
}

/// Names the ioctl that a `kvm-ioctls` call stands for.
pub(crate) trait Doing<T> {
    /// With the ioctl's name.
    fn doing(self, doing: &'static str) -> Result<T, KvmError>;
}

impl<T> Doing<T> for Result<T, kvm_ioctls::Error> {
    fn doing(self, doing: &'static str) -> Result<T, KvmError> {
        self.map_err(|error| KvmError::Ioctl { doing, detail: String::new(), source: std::io::Error::from_raw_os_error(error.errno()) })
    }
}

#[cfg(test)]
mod tests;
