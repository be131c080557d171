//! From the built image to what a guest boots: a root disk, and the app to start.
//!
//! Owns: the export out of buildah's store, the options of the file system. Never boots anything.
//!
//! The disk is raw, sparse and ext4 without a journal: snapshots of it are taken whole and while nothing writes, so there is
//! never a half-written file system to repair, and a journal would only make every clone's disk differ more.

use std::os::unix::fs::MetadataExt;

use model::Shape;
use protocol::agent::AppSpec;

use crate::{
    container::{Build, IMAGE},
    failure::{self, Stop},
    image_config::{self, ImageConfig},
    sandbox::{self, Ended, Network},
};

/// `$1` image, `$2` directory for the answers, `$3` disk, `$4` its size for mkfs.
///
/// The root is only mounted in the sandbox. What is in it is not trusted: nothing follows its links. The guest needs the mount
/// points that an image `FROM scratch` lacks, and an app its VOLUMEs, which a container runtime would make: buildah does that here
/// in the root itself, as its COPY does. With `assume_storage_prezeroed` the guest's kernel does not spend its
/// first minutes writing zeros into a file of zeros; e2fsprogs before 1.47 does not know it.
const EXPORT: &str = r#"
image=$1 out=$2 disk=$3 size=$4
b inspect --type image "$image" >"$out/image.json"
container=$(b from --pull-never "$image")
root=$(b mount "$container")
for dir in dev etc proc run sys tmp; do
    if [ ! -e "$root/$dir" ] && [ ! -L "$root/$dir" ]; then mkdir -m 755 "$root/$dir"; [ "$dir" != tmp ] || chmod 1777 "$root/tmp"; fi
done
mkdir "$out/empty"
b inspect --type image --format '{{range $at, $_ := .OCIv1.Config.Volumes}}{{println $at}}{{end}}' "$image" >"$out/volumes"
while IFS= read -r at; do
    [ -z "$at" ] || [ -e "$root/$at" ] || [ -L "$root/$at" ] || b copy --quiet "$container" "$out/empty" "$at"
done <"$out/volumes"
if [ ! -L "$root/etc" ] && [ ! -L "$root/etc/passwd" ] && [ -f "$root/etc/passwd" ]; then head -c 1048576 "$root/etc/passwd" >"$out/passwd"; fi
options=assume_storage_prezeroed=1
mkfs.ext4 -q -n -F -E "$options" "$disk" "$size" >/dev/null 2>&1 || options=lazy_itable_init=1
rm -f "$disk"
mkfs.ext4 -q -F -m 0 -O ^has_journal -E "$options" -L dormouse -d "$root" "$disk" "$size"
"#;

/// What is booted.
pub(crate) struct Root {
    pub app: AppSpec,
    /// Bytes of the disk that hold data.
    pub disk_bytes: u64,
}

/// Writes the root disk of the build's image into its workspace.
pub(crate) async fn export(build: &mut Build<'_>, shape: Shape, exposed_order: &[u16]) -> Result<Root, Stop> {
    let (dir, disk) = (build.workspace.dir.clone(), build.workspace.root_disk());
    let args = sandbox::args([&IMAGE, &dir, &disk, &format!("{}G", shape.disk_gib)]);
    let (mut full, mut last) = (false, String::new());
    let ended = build
        .run(EXPORT, args, Network::Nothing, &mut |line| {
            full |= line.contains("Could not allocate") || line.contains("No space left on device");
            last = line.to_owned();
        })
        .await?;
    match ended {
        Ended::Exit(0) => {}
        Ended::DeadlinePassed => return Err(failure::container_build("the build did not end in time; it was writing the root disk")),
        _ if full => return Err(failure::disk_full(format!("the files of the image do not fit on its disk of {} GiB: {last}", shape.disk_gib))),
        ended => return Err(failure::internal(format!("writing the root disk failed ({ended:?}): {last}"))),
    }
    let read = |name: &str| std::fs::read(dir.join(name)).map_err(|error| failure::internal(format!("reading {name} of the build failed: {error}")));
    let config = ImageConfig::from_inspect(&read("image.json")?).map_err(|error| failure::internal_error(&error))?;
    // Without one (FROM scratch) nobody has a home.
    let passwd = read("passwd").unwrap_or_default();
    let app = image_config::app(config, &String::from_utf8_lossy(&passwd), exposed_order).map_err(|error| failure::container_build(error.to_string()))?;
    let metadata = std::fs::metadata(&disk).map_err(|error| failure::internal(format!("looking at {} failed: {error}", disk.display())))?;
    Ok(Root { app, disk_bytes: metadata.blocks() * 512 })
}
