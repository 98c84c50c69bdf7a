// Every transaction of DICOMweb that the npm package dicomweb-client knows.  Arguments: the folder of node_modules, the
// origin, the base URL, a Part 10 file, its study, series and SOP instance UIDs.  On standard output a JSON object: what
// each call gave, bytes in base64, or {error}.
'use strict';

const { readFileSync } = require('fs');

const [modules, origin, url, file, study, series, instance] = process.argv.slice(2);
globalThis.XMLHttpRequest = require(`${modules}/xhr2`).XMLHttpRequest;
const { api } = require(`${modules}/dicomweb-client`);

for (const kind of ['debug', 'error', 'info', 'log']) console[kind] = () => {}; // it tells of much there
const client = new api.DICOMwebClient({ url });
const dataset = new Uint8Array(readFileSync(file)).buffer;
const ofStudy = { studyInstanceUID: study };
const ofSeries = { ...ofStudy, seriesInstanceUID: series };
const ofInstance = { ...ofSeries, sopInstanceUID: instance };
const png = { mediaTypes: [{ mediaType: 'image/png' }] };
const first = { frameNumbers: ['1'] };

const plain = (value) => {
  if (value instanceof ArrayBuffer) return { bytes: Buffer.from(value).toString('base64') };
  return Array.isArray(value) ? value.map(plain) : value;
};

async function all() {
  const given = {};
  const call = async (name, options, as = name) => {
    given[as] = await client[name](options).then(plain, (error) => ({ error: error.status ?? String(error) }));
  };
  await call('storeInstances', { datasets: [dataset] });
  await call('storeInstances', { datasets: [dataset], studyInstanceUID: study }, 'storeInstancesOfStudy');
  await call('searchForStudies', { queryParams: { StudyInstanceUID: study } });
  await call('searchForSeries', ofStudy, 'searchForSeriesOfStudy');
  await call('searchForSeries', { queryParams: { StudyInstanceUID: study } });
  await call('searchForInstances', ofStudy, 'searchForInstancesOfStudy');
  await call('searchForInstances', ofSeries, 'searchForInstancesOfSeries');
  await call('searchForInstances', { queryParams: { SOPInstanceUID: instance } });
  await call('retrieveStudyMetadata', ofStudy);
  await call('retrieveSeriesMetadata', ofSeries);
  await call('retrieveInstanceMetadata', ofInstance);
  await call('retrieveStudy', ofStudy);
  await call('retrieveSeries', ofSeries);
  await call('retrieveInstance', ofInstance);
  await call('retrieveInstanceFrames', { ...ofInstance, ...first });
  await call('retrieveInstanceRendered', { ...ofInstance, ...png });
  await call('retrieveInstanceFramesRendered', { ...ofInstance, ...first, ...png });
  await call('retrieveInstanceThumbnail', { ...ofInstance, ...png });
  await call('retrieveInstanceFramesThumbnail', { ...ofInstance, ...first, ...png });
  const uri = [given.retrieveInstanceMetadata].flat()[0]['7FE00010'].BulkDataURI;
  await call('retrieveBulkData', { BulkDataURI: new URL(uri, origin).href });
  return given;
}

all().then((given) => process.stdout.write(JSON.stringify(given)));
