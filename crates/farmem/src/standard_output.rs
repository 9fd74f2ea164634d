//! Standard output: what a command lists, or reads for somebody. Where it cannot be written the command has
//! failed.

use std::io::{self, ErrorKind, Write};

/// Nobody reads standard output any more: what was to go there is nobody's, and whoever has gone is told
/// nothing.
#[derive(Debug, thiserror::Error)]
#[error("nobody reads standard output")]
pub(crate) struct Unread;

/// Writes all of it.
///
/// # Errors
/// [`Unread`], or why else it cannot be written.
pub(crate) fn write(bytes: impl AsRef<[u8]>) -> anyhow::Result<()> {
    let mut output = io::stdout().lock();
    failed(output.write_all(bytes.as_ref()).and_then(|()| output.flush()))
}

/// Writes a value as JSON.
///
/// # Errors
/// As [`write()`].
pub(crate) fn write_json(value: &impl serde::Serialize) -> anyhow::Result<()> {
    write(serde_json::to_string_pretty(value)? + "\n")
}

fn failed(result: io::Result<()>) -> anyhow::Result<()> {
    result.map_err(|error| match error.kind() {
        ErrorKind::BrokenPipe => Unread.into(),
        _ => anyhow::Error::new(error).context("cannot write to standard output"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reader_that_has_gone_is_told_apart() {
        let unread = failed(Err(ErrorKind::BrokenPipe.into())).unwrap_err();
        assert!(unread.is::<Unread>());
        let full = failed(Err(ErrorKind::StorageFull.into())).unwrap_err();
        assert!(!full.is::<Unread>());
        assert!(full.to_string().contains("standard output"), "{full}");
    }
}
