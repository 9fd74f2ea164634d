//! The flags of `farmem region`.

use std::path::PathBuf;
use std::str::FromStr;

use clap::{Args, Subcommand};

use crate::cli::OutputOptions;
use crate::size::Size;

/// `farmem region`.
#[derive(Debug, Subcommand)]
pub(crate) enum RegionCommand {
    /// Make a region, which costs nothing until it is written
    Create(CreateOptions),
    /// List the regions of a server
    List(ListOptions),
    /// Show one region: how much of it is written, and where that lies
    Show(ShowOptions),
    /// Delete a region with all that it holds
    Delete(NameOptions),
    /// Make a writable virtual copy, at once and however large the region is
    Clone(CloneOptions),
    /// Make a virtual copy that never changes
    Snapshot(SnapshotOptions),
    /// Fill a range, bring it into memory and keep it there
    Pin(RangeOptions),
    /// Let a range leave memory again
    Unpin(RangeOptions),
    /// Fill a range and bring it into memory
    Prefetch(RangeOptions),
    /// Fill what was never written of a range
    Initialise(RangeOptions),
    /// Forget what was written to a range
    Invalidate(RangeOptions),
    /// Write what changed to the region's file, and wait until the disk has it
    Flush(RangeOptions),
    /// Back a region up to a directory of the server's machine, as it is at this instant
    Backup(BackupOptions),
    /// Make a region from a backup
    Restore(RestoreOptions),
    /// Copy a region, as it is at this instant, or a part of it, here or to another server
    Copy(CopyOptions),
    /// Write a range of a region to standard output
    Read(RangeOptions),
    /// Write standard input to a region
    Write(WriteOptions),
}

/// Which server.
#[derive(Debug, Args)]
pub(crate) struct ServerOption {
    /// The memory server: HOST:PORT or unix:PATH
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:7070", env = "FARMEM_SERVER")]
    pub(crate) server: String,
}

/// `farmem region create`.
#[derive(Debug, Args)]
pub(crate) struct CreateOptions {
    /// Its name
    pub(crate) name: String,
    /// Its size [default with --file: the rest of the file]
    #[arg(long, value_name = "SIZE")]
    pub(crate) size: Option<Size>,
    /// The unit in which it is filled, found changed and written back: 512, 1K, 4K, 64K or 2M
    #[arg(long, value_name = "SIZE", default_value = "4K")]
    pub(crate) page_size: Size,
    /// The byte that it holds where it was never written
    #[arg(long, value_name = "BYTE", default_value = "0", conflicts_with = "file")]
    pub(crate) fill: u8,
    /// The file that it holds, in a directory that the server allows
    #[arg(long, value_name = "FILE")]
    pub(crate) file: Option<PathBuf>,
    /// Where in the file it begins
    #[arg(long, value_name = "SIZE", default_value = "0", requires = "file")]
    pub(crate) offset: Size,
    #[command(flatten)]
    pub(crate) server: ServerOption,
}

/// `farmem region list`.
#[derive(Debug, Args)]
pub(crate) struct ListOptions {
    #[command(flatten)]
    pub(crate) server: ServerOption,
    #[command(flatten)]
    pub(crate) output: OutputOptions,
}

/// `farmem region show`.
#[derive(Debug, Args)]
pub(crate) struct ShowOptions {
    /// The region
    pub(crate) name: String,
    #[command(flatten)]
    pub(crate) server: ServerOption,
    #[command(flatten)]
    pub(crate) output: OutputOptions,
}

/// A region.
#[derive(Debug, Args)]
pub(crate) struct NameOptions {
    /// The region
    pub(crate) name: String,
    #[command(flatten)]
    pub(crate) server: ServerOption,
}

/// `farmem region clone`.
#[derive(Debug, Args)]
pub(crate) struct CloneOptions {
    /// The region
    pub(crate) name: String,
    /// The copy's name
    pub(crate) copy: String,
    /// Let the copy have its own of what is read too, not only of what is written
    #[arg(long)]
    pub(crate) on_access: bool,
    #[command(flatten)]
    pub(crate) server: ServerOption,
}

/// `farmem region snapshot`.
#[derive(Debug, Args)]
pub(crate) struct SnapshotOptions {
    /// The region
    pub(crate) name: String,
    /// The snapshot's name
    pub(crate) copy: String,
    #[command(flatten)]
    pub(crate) server: ServerOption,
}

/// `farmem region backup`.
#[derive(Debug, Args)]
pub(crate) struct BackupOptions {
    /// The region
    pub(crate) name: String,
    /// The directory, in one that the server allows; it is made if there is none
    pub(crate) directory: PathBuf,
    /// Write everything anew, not only what has changed since the backup that is there
    #[arg(long)]
    pub(crate) full: bool,
    #[command(flatten)]
    pub(crate) server: ServerOption,
}

/// `farmem region restore`.
#[derive(Debug, Args)]
pub(crate) struct RestoreOptions {
    /// The directory of the backup
    pub(crate) directory: PathBuf,
    /// The region's name
    pub(crate) name: String,
    /// Take the place of a region that has the name
    #[arg(long)]
    pub(crate) replace: bool,
    #[command(flatten)]
    pub(crate) server: ServerOption,
}

/// `farmem region copy`.
#[derive(Debug, Args)]
pub(crate) struct CopyOptions {
    /// The region
    pub(crate) name: String,
    /// The region to copy to, which is made if there is none
    pub(crate) to: String,
    /// The range, as OFFSET:LENGTH [default: all of it]
    #[arg(long, value_name = "RANGE")]
    pub(crate) range: Option<ByteRange>,
    /// Where it begins in the other region [default: where it does in this one]
    #[arg(long, value_name = "SIZE")]
    pub(crate) to_offset: Option<Size>,
    /// The server of the other region [default: the same]
    #[arg(long, value_name = "ADDR")]
    pub(crate) to_server: Option<String>,
    #[command(flatten)]
    pub(crate) server: ServerOption,
}

/// A range of a region.
#[derive(Debug, Args)]
pub(crate) struct RangeOptions {
    /// The region
    pub(crate) name: String,
    /// The range, as OFFSET:LENGTH [default: all of it]
    #[arg(long, value_name = "RANGE")]
    pub(crate) range: Option<ByteRange>,
    #[command(flatten)]
    pub(crate) server: ServerOption,
}

/// `farmem region write`.
#[derive(Debug, Args)]
pub(crate) struct WriteOptions {
    /// The region
    pub(crate) name: String,
    /// Where to begin
    #[arg(long, value_name = "SIZE", default_value = "0")]
    pub(crate) offset: Size,
    #[command(flatten)]
    pub(crate) server: ServerOption,
}

/// Bytes of a region.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ByteRange {
    pub(crate) offset: u64,
    pub(crate) length: u64,
}

impl FromStr for ByteRange {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (offset, length) = text.split_once(':').ok_or("a range is OFFSET:LENGTH")?;
        let size = |text: &str| text.parse::<Size>().map_err(|error| error.to_string());
        let (Size(offset), Size(length)) = (size(offset)?, size(length)?);
        offset.checked_add(length).ok_or("the range ends beyond 16 EiB")?;
        Ok(Self { offset, length })
    }
}
