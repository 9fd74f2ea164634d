//! `FARMEM_RUN`: all that a program inherits from its supervisor.
//!
//! `v1:<abstract socket name>:<local limit in bytes>:<path of farmem-pagerd>`. The path comes last
//! because it may hold colons. The preload library, which links none of this, reads the same form.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;

/// The name of the variable.
pub const RUN_VARIABLE: &str = "FARMEM_RUN";

/// The variable's content.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunVariable {
    /// Abstract name of the supervisor's socket, without the leading zero byte.
    pub socket: String,
    /// The program's local limit until the supervisor names another one.
    pub limit_bytes: u64,
    /// The pager's executable.
    pub pagerd: PathBuf,
}

/// The value is not what a supervisor of this version sets.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{RUN_VARIABLE} is not of the form v1:SOCKET:BYTES:PATH")]
pub struct RunVariableError;

impl RunVariable {
    /// The value to set.
    #[must_use]
    pub fn encode(&self) -> OsString {
        let mut value = format!("v1:{}:{}:", self.socket, self.limit_bytes).into_bytes();
        value.extend_from_slice(self.pagerd.as_os_str().as_bytes());
        OsString::from_vec(value)
    }

    /// Takes a value apart.
    ///
    /// # Errors
    /// [`RunVariableError`] for anything that [`Self::encode`] does not make.
    pub fn decode(value: &OsStr) -> Result<Self, RunVariableError> {
        let mut parts = value.as_bytes().splitn(4, |&byte| byte == b':');
        let mut part = || parts.next().ok_or(RunVariableError);
        let text = |bytes| std::str::from_utf8(bytes).map_err(|_| RunVariableError);
        if part()? != b"v1" {
            return Err(RunVariableError);
        }
        let socket = text(part()?)?.to_owned();
        let limit_bytes = text(part()?)?.parse().map_err(|_| RunVariableError)?;
        let pagerd = PathBuf::from(OsStr::from_bytes(part()?));
        if socket.is_empty() || !pagerd.is_absolute() {
            return Err(RunVariableError);
        }
        Ok(Self { socket, limit_bytes, pagerd })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn round_trip_with_a_colon_in_the_path() {
        let variable = RunVariable {
            socket: "farmem-00ff".to_owned(),
            limit_bytes: 16 << 20,
            pagerd: PathBuf::from("/opt/a:b/farmem-pagerd"),
        };
        assert_eq!(variable.encode(), "v1:farmem-00ff:16777216:/opt/a:b/farmem-pagerd");
        assert_eq!(RunVariable::decode(&variable.encode()), Ok(variable));
    }

    #[test]
    fn anything_else_is_refused() {
        for value in ["", "v1", "v2:a:1:/p", "v1:a:x:/p", "v1:a:1:p", "v1::1:/p", "v1:a:-1:/p"] {
            assert_eq!(RunVariable::decode(OsStr::new(value)), Err(RunVariableError), "{value}");
        }
    }
}
