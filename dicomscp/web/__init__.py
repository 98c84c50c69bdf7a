"""DICOMweb (PS3.18) over HTTP: the only room that is asynchronous."""
