//! Threads of the pager, on stacks of its own memory: those of the standard library would be
//! mapped by the C library, and paged like any other memory of the program.

use std::ffi::{CString, c_void};
use std::io;
use std::mem::MaybeUninit;

use super::memory::{self, Presence};

type Body = Box<dyn FnOnce() + Send>;

/// Starts a thread that runs `body` on a stack of `stack_bytes`, and is never joined: threads of the
/// pager live as long as it does.
///
/// # Errors
/// What the kernel says.
pub(crate) fn spawn(
    name: &str,
    stack_bytes: usize,
    body: impl FnOnce() + Send + 'static,
) -> io::Result<()> {
    let stack = memory::map(stack_bytes, Presence::WhenTouched)?;
    let name = CString::new(name)?;
    let body: Body = Box::new(move || {
        // SAFETY: the name is a C string; the kernel cuts it at 15 bytes.
        unsafe { libc::prctl(libc::PR_SET_NAME, name.as_ptr()) };
        body();
    });
    let body = Box::into_raw(Box::new(body));
    let created = create(stack.as_ptr().cast(), stack.len(), body);
    if created.is_err() {
        // SAFETY: there is no thread that has taken it.
        drop(unsafe { Box::from_raw(body) });
    }
    created
}

fn create(stack: *mut c_void, stack_bytes: usize, body: *mut Body) -> io::Result<()> {
    let check = |code| {
        if code == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(code)) }
    };
    let mut attributes = MaybeUninit::uninit();
    let mut thread = MaybeUninit::uninit();
    // SAFETY: the attributes are initialised by the first call and destroyed by the last; the stack
    // is the new thread's for ever; `run` takes the body.
    unsafe {
        check(libc::pthread_attr_init(attributes.as_mut_ptr()))?;
        let attributes = attributes.as_mut_ptr();
        let created = check(libc::pthread_attr_setstack(attributes, stack, stack_bytes))
            .and_then(|()| {
                let detached = libc::PTHREAD_CREATE_DETACHED;
                check(libc::pthread_attr_setdetachstate(attributes, detached))
            })
            .and_then(|()| {
                check(libc::pthread_create(thread.as_mut_ptr(), attributes, run, body.cast()))
            });
        libc::pthread_attr_destroy(attributes);
        created
    }
}

extern "C" fn run(body: *mut c_void) -> *mut c_void {
    // SAFETY: `spawn` made it for this thread alone.
    let body = unsafe { Box::from_raw(body.cast::<Body>()) };
    body();
    std::ptr::null_mut()
}
