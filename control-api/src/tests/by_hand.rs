//! An API to try real clients against, without QEMU.

use std::time::Duration;

use super::bench::Bench;

/// Serves until the file `stop` appears in its directory; every image build succeeds at once. Run it with
/// `cargo test -p control-api by_hand -- --ignored --nocapture`; it prints what `eval` in a shell needs.
#[tokio::test]
#[ignore = "serves until it is told to stop"]
async fn serve_by_hand() {
    let bench = Bench::new().await;
    let address = bench.address;
    println!("export AWS_ENDPOINT_URL_LAMBDA_MICROVMS=http://{address} AWS_ENDPOINT_URL_S3=http://{address} AWS_REGION=us-east-1 AWS_DEFAULT_REGION=us-east-1");
    println!("export AWS_ACCESS_KEY_ID={} AWS_SECRET_ACCESS_KEY={} STOP={}", bench.key.id, bench.key.secret, bench.dir.path().join("stop").display());
    let mut ticks = tokio::time::interval(Duration::from_millis(200));
    while !bench.dir.path().join("stop").exists() {
        ticks.tick().await;
        for image in bench.images.catalog.images() {
            for record in image.versions.iter().filter(|record| !record.state.is_finished()) {
                bench.images.end_version(record.name.as_str(), record.version.major, None).await;
            }
        }
    }
}
