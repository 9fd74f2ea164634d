//! What this machine's kernel grants to this process, found by asking for it: for `farmem doctor`
//! and for `farmem run` before it starts a program.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use linux_raw_sys::general as sys;
use linux_raw_sys::ioctl;

use crate::{Features, Uffd, UffdError};

/// `_IO(0xAA, 0x00)` on /dev/userfaultfd makes a userfaultfd.
const USERFAULTFD_IOC_NEW: u32 = 0xAA00;

/// The features of userfaultfd that paging uses, as the kernel's header names them.
const FEATURES: [(&str, u32); 6] = [
    ("MOVE", sys::UFFD_FEATURE_MOVE),
    ("EVENT_FORK", sys::UFFD_FEATURE_EVENT_FORK),
    ("EVENT_REMAP", sys::UFFD_FEATURE_EVENT_REMAP),
    ("EVENT_REMOVE", sys::UFFD_FEATURE_EVENT_REMOVE),
    ("EVENT_UNMAP", sys::UFFD_FEATURE_EVENT_UNMAP),
    ("THREAD_ID", sys::UFFD_FEATURE_THREAD_ID),
];

/// Bytes of a `struct io_uring_params`.
const IO_URING_PARAMETERS_BYTES: usize = 120;

/// What was found.
#[derive(Debug)]
pub struct Probe {
    /// Making a userfaultfd by /dev/userfaultfd, which needs permission on the file only.
    pub device: io::Result<()>,
    /// Making one by the system call, which containers often block and which, for faults from
    /// within the kernel, needs CAP_SYS_PTRACE or vm.unprivileged_userfaultfd.
    pub syscall: io::Result<()>,
    /// For each feature that paging uses whether the kernel has it; empty where no userfaultfd can
    /// be made.
    pub features: Vec<(&'static str, bool)>,
    /// Making the userfaultfd that a pager works with, fork events included (CAP_SYS_PTRACE).
    pub paging: Result<(), UffdError>,
    /// Whether io_uring may be used.
    pub io_uring: io::Result<()>,
}

/// Asks the kernel. Nothing of it lasts.
#[must_use]
pub fn probe() -> Probe {
    let device = open_device();
    let syscall = open_syscall();
    let features = device.as_ref().or(syscall.as_ref()).ok().map(supported).unwrap_or_default();
    Probe {
        device: device.map(drop),
        syscall: syscall.map(drop),
        features,
        paging: Uffd::new(Features::Events).map(drop),
        io_uring: io_uring(),
    }
}

fn open_device() -> io::Result<OwnedFd> {
    let device = std::fs::File::options().read(true).write(true).open("/dev/userfaultfd")?;
    let request = libc::Ioctl::from(USERFAULTFD_IOC_NEW);
    // SAFETY: this request takes flags by value and returns a new descriptor.
    let raw = unsafe { libc::ioctl(device.as_raw_fd(), request, libc::O_CLOEXEC) };
    owned(raw.into())
}

fn open_syscall() -> io::Result<OwnedFd> {
    // SAFETY: userfaultfd(2) takes flags and returns a new descriptor.
    owned(unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC) })
}

fn owned(raw: i64) -> io::Result<OwnedFd> {
    match i32::try_from(raw) {
        // SAFETY: the kernel has just returned this descriptor to us and nobody else knows it.
        Ok(raw) if raw >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(raw) }),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Asking for no feature makes the kernel name all that it has.
fn supported(uffd: &OwnedFd) -> Vec<(&'static str, bool)> {
    let mut api = sys::uffdio_api { api: u64::from(sys::UFFD_API), features: 0, ioctls: 0 };
    let request = libc::Ioctl::from(ioctl::UFFDIO_API);
    // SAFETY: UFFDIO_API reads and writes one uffdio_api, which `api` is.
    let answer = unsafe { libc::ioctl(uffd.as_raw_fd(), request, &raw mut api) };
    if answer != 0 {
        return Vec::new();
    }
    FEATURES.iter().map(|&(name, bit)| (name, api.features & u64::from(bit) != 0)).collect()
}

/// No ring is made: a ring of no entries is invalid where rings are permitted at all.
fn io_uring() -> io::Result<()> {
    let mut parameters = [0_u64; IO_URING_PARAMETERS_BYTES / size_of::<u64>()];
    // SAFETY: the second argument is writable memory of the size of a struct io_uring_params.
    let answer = unsafe { libc::syscall(libc::SYS_io_uring_setup, 0, parameters.as_mut_ptr()) };
    let error = io::Error::last_os_error();
    if answer < 0 && error.raw_os_error() != Some(libc::EINVAL) { Err(error) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn where_paging_works_its_features_are_found() {
        let probe = probe();
        if probe.paging.is_err() {
            eprintln!("skipped: no userfaultfd here: {probe:?}");
            return;
        }
        assert!(probe.device.is_ok() || probe.syscall.is_ok());
        assert_eq!(probe.features.len(), FEATURES.len());
        assert!(probe.features.iter().all(|&(_, found)| found), "{probe:?}");
    }
}
