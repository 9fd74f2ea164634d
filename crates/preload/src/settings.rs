//! What `farmem run` asks of this library: the one variable of the environment, and the auxiliary
//! vector that lies behind it, which the pager's start-up code wants.
//!
//! Both are copied into this library when it is loaded: the program may overwrite its environment,
//! and forked children start their own watcher from the copy.

use core::cell::UnsafeCell;
use core::ffi::{CStr, c_char};

use crate::text::Text;

const VARIABLE: &[u8] = b"FARMEM_RUN=";

/// An abstract socket's name: what `sockaddr_un` holds behind its leading zero byte.
const SOCKET_NAME_BYTES: usize = 107;
/// PATH_MAX of the kernel.
const PATH_BYTES: usize = 4096;
/// The kernel's vector has 24 entries on today's kernels; entries beyond the limit are left out.
const AUXILIARY_MAX: usize = 40;

/// FARMEM_RUN, taken apart: `v1:<abstract socket name>:<limit in bytes>:<path of farmem-pagerd>`.
#[derive(Debug)]
pub(crate) struct Settings {
    /// The supervisor's control socket, without the leading zero byte.
    pub(crate) socket: Text<SOCKET_NAME_BYTES>,
    /// Anonymous memory that the program may have resident.
    pub(crate) limit_bytes: u64,
    /// The image of the pager.
    pub(crate) pager: Text<PATH_BYTES>,
    /// The program's auxiliary vector, without its final entry.
    auxiliary: [(usize, usize); AUXILIARY_MAX],
    auxiliary_length: usize,
}

impl Settings {
    pub(crate) fn auxiliary(&self) -> &[(usize, usize)] {
        &self.auxiliary[..self.auxiliary_length]
    }
}

struct Once(UnsafeCell<Settings>);

// SAFETY: written by `read` alone, before the process has a second thread, and read afterwards.
unsafe impl Sync for Once {}

static SETTINGS: Once = Once(UnsafeCell::new(Settings {
    socket: Text::new(),
    limit_bytes: 0,
    pager: Text::new(),
    auxiliary: [(0, 0); AUXILIARY_MAX],
    auxiliary_length: 0,
}));

/// The settings of this process. Only for those who know that `read` said that there are some.
pub(crate) fn settings() -> &'static Settings {
    // SAFETY: nothing writes after the constructor.
    unsafe { &*SETTINGS.0.get() }
}

/// Reads the settings from the environment: `Ok(false)` if the variable is not there, `Err` with
/// what is wrong if it is malformed.
///
/// # Safety
/// `environment` is the process's own vector as the kernel laid it out, the auxiliary vector
/// behind it; nobody else uses the settings yet.
pub(crate) unsafe fn read(environment: *const *const c_char) -> Result<bool, &'static str> {
    let mut entry = environment;
    let mut value = None;
    // SAFETY: the vector ends with a null pointer, each entry before it is a C string, and all
    // live as long as the process does.
    unsafe {
        while !(*entry).is_null() {
            if let Some(found) = CStr::from_ptr(*entry).to_bytes().strip_prefix(VARIABLE) {
                value = Some(found);
            }
            entry = entry.add(1);
        }
    }
    let Some(value) = value else { return Ok(false) };
    // SAFETY: the caller promises that nobody else uses the settings.
    let settings = unsafe { &mut *SETTINGS.0.get() };
    parse(value, settings)?;
    // SAFETY: the auxiliary vector follows the null pointer, pairs of words that end with AT_NULL.
    unsafe {
        let mut pair = entry.add(1).cast::<(usize, usize)>();
        while (*pair).0 != 0 && settings.auxiliary_length < AUXILIARY_MAX {
            settings.auxiliary[settings.auxiliary_length] = *pair;
            settings.auxiliary_length += 1;
            pair = pair.add(1);
        }
    }
    Ok(true)
}

fn parse(value: &[u8], settings: &mut Settings) -> Result<(), &'static str> {
    let mut parts = value.splitn(4, |&byte| byte == b':');
    let mut part = || parts.next().filter(|part| !part.is_empty());
    if part() != Some(b"v1") {
        return Err("it does not begin with v1:");
    }
    let socket = part().ok_or("it has no socket name")?;
    if !settings.socket.push(socket) {
        return Err("its socket name is too long");
    }
    let limit = part().ok_or("it has no limit")?;
    settings.limit_bytes = core::str::from_utf8(limit)
        .ok()
        .and_then(|limit| limit.parse().ok())
        .ok_or("its limit is not a number of bytes")?;
    let pager = part().ok_or("it has no path of farmem-pagerd")?;
    if !pager.starts_with(b"/") {
        return Err("its path of farmem-pagerd does not begin with /");
    }
    if !settings.pager.push(pager) {
        return Err("its path of farmem-pagerd is too long");
    }
    Ok(())
}
