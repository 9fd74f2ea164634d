//! Regions of a process that forks.
#![expect(unsafe_code, reason = "fork")]

use farmem_client::{Region, RegionError};

use crate::mapped::may_page;
use crate::server::TestServer;

/// Runs `child` in a forked child and returns whether it was right.
fn in_a_child(child: impl FnOnce() -> bool) -> bool {
    // SAFETY: the child calls what the C library allows after fork (it makes its allocator usable in the
    // child), takes no lock that another thread may have had, and ends without the parent's destructors.
    let pid = unsafe { libc::fork() };
    if pid == 0 {
        // Should the child wait for ever, nobody else would notice.
        // SAFETY: a plain system call, and one that does not return.
        unsafe {
            libc::alarm(20);
            libc::_exit(i32::from(!child()));
        }
    }
    let mut status = 0;
    // SAFETY: the status is written by the kernel.
    let waited = unsafe { libc::waitpid(pid, &raw mut status, 0) };
    waited == pid && status == 0
}

#[test]
fn a_forked_child_is_refused_and_ends_nothing() {
    let server = TestServer::start(64);
    let mut region = Region::create(server.options(8)).unwrap();
    region.write(0, &[7; 4096]).unwrap();
    region.flush().unwrap();
    let right = in_a_child(|| {
        let mut byte = [0];
        let read = region.read(0, &mut byte);
        let wrote = region.write(0, &byte);
        let flushed = region.flush();
        // SAFETY: the child does not use the value itself any more.
        drop(unsafe { std::ptr::read(&raw const region) });
        let refused = |result| matches!(result, Err(RegionError::Forked { .. }));
        refused(read) && refused(wrote) && refused(flushed)
    });
    assert!(right);
    let mut page = [0; 4096];
    for offset in [0, 1 << 20] {
        region.read(offset, &mut page).unwrap();
        assert_eq!(page, [if offset == 0 { 7 } else { 0 }; 4096]);
    }
    region.close().unwrap();
}

#[test]
fn a_forked_child_of_a_mapping_ends_nothing() {
    if !may_page() {
        return;
    }
    let server = TestServer::start(64);
    let mut mapped = Region::create(server.options(8)).unwrap().map().unwrap();
    mapped.as_mut_slice()[0] = 7;
    let right = in_a_child(|| {
        let flushed = mapped.flush();
        // SAFETY: the child does not use the value itself any more.
        drop(unsafe { std::ptr::read(&raw const mapped) });
        matches!(flushed, Err(RegionError::Forked { .. }))
    });
    assert!(right);
    mapped.flush().unwrap();
    assert_eq!(mapped.as_slice()[0], 7);
    let mut region = mapped.unmap().unwrap();
    let mut byte = [0];
    region.read(0, &mut byte).unwrap();
    assert_eq!(byte, [7]);
}
