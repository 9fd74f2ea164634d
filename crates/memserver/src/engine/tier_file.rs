//! The file of the slowest tier: under which name it is, and what is said where it is not.

use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use farmem_region::{PageIndex, RegionId, Version};
use farmem_wire::part_checksum;

use crate::config::ServerConfig;
use crate::journal::{DataDirectory, DataError};
use crate::server::ServerError;
use crate::tiers::{FileLacks, FileTier, Tiers};

/// Bytes of the longest name of the file tier's file: a file system allows 255, with what follows where it is
/// set aside.
const TIER_NAME_MAX: usize = 240;

/// The file of the slowest tier, by a name if it is to be found again.
pub(super) fn file_tier(
    config: &ServerConfig,
    directory: Option<&DataDirectory>,
    empty: bool,
) -> io::Result<Option<FileTier>> {
    let Some(tier) = &config.tiers.file else { return Ok(None) };
    let Some(directory) = directory else { return FileTier::create(tier, None, empty).map(Some) };
    FileTier::create(tier, Some(&tier_name(directory)), empty).map(Some)
}

/// The file of the slowest tier under the name that a build before has given it. It may be another directory's:
/// to be asked for only by who has pages in a file that is not there under its own name.
pub(super) fn former_file_tier(
    config: &ServerConfig,
    directory: &DataDirectory,
) -> Option<FileTier> {
    let tier = config.tiers.file.as_ref()?;
    // What another server has under that name was never this one's.
    FileTier::create(tier, Some(&former_tier_name(directory)), false).ok()
}

/// One name for each directory of data, so that servers do not share a file: its path with hyphens for slashes,
/// and all but letters, digits, points and underlines as percent signs and two digits; a checksum in its place
/// where that is too long.
fn tier_name(directory: &DataDirectory) -> String {
    let path = directory.path().canonicalize().unwrap_or_default();
    let path = path.as_os_str().as_encoded_bytes();
    let mut name = "farmem-tier".to_owned();
    for byte in path {
        match byte {
            b'/' => name.push('-'),
            b'.' | b'_' => name.push(char::from(*byte)),
            byte if byte.is_ascii_alphanumeric() => name.push(char::from(*byte)),
            byte => name.push_str(&format!("%{byte:02x}")),
        }
    }
    if name.len() <= TIER_NAME_MAX {
        return name;
    }
    let (region, page, version) = (RegionId::new(0), PageIndex::new(0), Version::new(0));
    let checksum = part_checksum(region, page, version, 0, path);
    format!("farmem-tier.{:016x}", checksum.get())
}

/// As builds before named it. Some directories share such a name.
fn former_tier_name(directory: &DataDirectory) -> String {
    let path = directory.path().canonicalize().unwrap_or_default();
    format!("farmem-tier{}", path.display().to_string().replace('/', "-"))
}

/// Gives a file that was found under its former name the one that no other directory's has.
pub(super) fn rename_tier(config: &ServerConfig, directory: &DataDirectory, tiers: &Tiers) {
    let (Some(tier), Some(file)) = (&config.tiers.file, tiers.file_tier()) else { return };
    let [now, former] =
        [tier_name(directory), former_tier_name(directory)].map(|name| tier.directory.join(name));
    let number = rustix::fs::fstat(file.descriptor()).map(|about| about.st_ino);
    let is_it = std::fs::symlink_metadata(&former).is_ok_and(|about| number == Ok(about.ino()));
    if now != former && is_it && !now.exists() {
        // If that fails it is found by the former name again.
        let _ = std::fs::rename(former, now);
    }
}

/// Why there is no file tier.
pub(super) fn no_tier(
    config: &ServerConfig,
    directory: &DataDirectory,
    source: io::Error,
) -> ServerError {
    match tier_path(config, directory) {
        Some(path) if source.kind() == io::ErrorKind::ResourceBusy => DataError::InUse(path).into(),
        _ => ServerError::Arena { memory: config.memory, source },
    }
}

pub(super) fn tier_path(config: &ServerConfig, directory: &DataDirectory) -> Option<PathBuf> {
    config.tiers.file.as_ref().map(|tier| tier.directory.join(tier_name(directory)))
}

/// What a server is told whose file tier does not hold what lies in it.
pub(super) fn missing_in_file(lacks: FileLacks, path: Option<PathBuf>) -> String {
    match (lacks, path) {
        (_, None) => "pages of it lie in a file: give it the same --tier file=DIR:SIZE".to_owned(),
        (FileLacks::File, Some(path)) => format!(
            "pages of it lie in {}, which is not there: look whether its disk is mounted, and \
             whether --tier file=DIR:SIZE names the same DIR",
            path.display()
        ),
        (FileLacks::Limit(bytes), Some(path)) => format!(
            "pages of it lie in {} up to byte {bytes}: give --tier file=DIR:SIZE at least that SIZE",
            path.display()
        ),
        (FileLacks::Content(bytes), Some(path)) => format!(
            "pages of it lie in {} up to byte {bytes}, and that is shorter: bring back the file, or \
             remove the directory with all that it holds",
            path.display()
        ),
    }
}
